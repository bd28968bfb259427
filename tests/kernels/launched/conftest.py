"""Kernels as they are launched: on a GPU, or line by line on the CPU under TRITON_INTERPRET=1.

``tests/kernels/test_interpreted.py`` starts the processes that have it set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtprune import kernels
from vtprune.kernels import _dispatch

HERE = Path(__file__).parent
EMPTY = ("empty", "empty_like")


NOWHERE = "needs a CUDA device, or TRITON_INTERPRET=1 from the start of the process"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    somewhere = _dispatch.INTERPRETING or torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not somewhere:
                item.add_marker(pytest.mark.skip(NOWHERE))


@pytest.fixture
def device() -> str:
    """Where kernels are launched."""
    return "cpu" if _dispatch.INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def poisoned(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only kernels run, and what they are to write holds NaN, or -7, before."""

    def filled(make):
        def made(*args, **kwargs) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -7)

        return made

    for name in EMPTY:
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
    kernels.reset_stats()
    with kernels.use("triton"):
        yield
    assert not [op for op, backend in kernels.stats() if backend != "triton"]
