"""Options and reports of the suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.golden_harness import Case, GoldenError, find_cases

SHIPPED = Path(__file__).parent / "golden"
GOLDEN_CASES = pytest.StashKey[list[Case]]()

# The same examples in every run; a failure names its own anyway.
settings.register_profile("vtprune", derandomize=True, deadline=None)
settings.load_profile("vtprune")


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models: on a busy machine threads wait for each other, six times as long as they work.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    asked: list[str] = getattr(config.option, "golden", [])
    folders = [config.invocation_params.dir / given for given in asked]
    try:
        cases = [case for folder in (SHIPPED, *folders) for case in find_cases(folder)]
    except GoldenError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[GOLDEN_CASES] = list({case.path.resolve(): case for case in cases}.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        cases = metafunc.config.stash[GOLDEN_CASES]
        metafunc.parametrize("golden_case", cases, ids=lambda case: case.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many recorded cases ran."""
    reports = [r for how in ("passed", "failed") for r in terminalreporter.getreports(how)]
    run = sum("golden" in dict(r.user_properties) for r in reports if r.when == "call")
    if run:
        terminalreporter.write_line(f"golden cases run: {run}")
