# make demo | make test: set up .venv on first use, and again when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test
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
