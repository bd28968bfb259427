"""One engine per process: vLLM cannot start a second one beside it. ``make test-serve`` does so."""

from __future__ import annotations

import importlib.util
import os

import pytest

# Before vllm is imported; a file may have others in its ENVIRONMENT.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_started: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _alone(request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed; make test-serve has it")
    if _started and _started[0] != request.node.nodeid:
        pytest.skip("another engine runs in this process; make test-serve gives each its own")
    _started.append(request.node.nodeid)
    own = getattr(request.module, "ENVIRONMENT", {})
    os.environ.update(SETTINGS | own)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "all"  # only works with one process
