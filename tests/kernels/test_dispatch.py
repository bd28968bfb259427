"""Which form of an operation runs, how that is chosen, and what is counted."""

from __future__ import annotations

import pytest
import torch

from vtprune import kernels
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.kernels import _dispatch
from vtprune.kernels.topk_sorted import topk_sorted

X = torch.tensor([[3.0, 1.0, 2.0]])
RAN = ("topk_sorted", "torch")


@pytest.fixture(autouse=True)
def fresh():
    with kernels.use("auto"):
        kernels.reset_stats()
        yield


def test_torch_runs_on_the_cpu_and_is_counted():
    topk_sorted(X, 1)
    with kernels.use("torch"):
        topk_sorted(X, 2)
    assert kernels.stats() == {RAN: 2}
    kernels.reset_stats()
    assert kernels.stats() == {}


def test_strict_says_why_there_is_no_kernel():
    said = "topk_sorted has no kernel for this call: .*(on 'cpu'|not installed).*use\\('auto'\\)"
    with kernels.use("triton"), pytest.raises(UnsupportedError, match=said):
        topk_sorted(X, 1)
    assert kernels.stats() == {}
    assert topk_sorted(X, 1).tolist() == [[0]]


def test_the_choice_holds_until_the_end_of_a_with_or_for_good():
    with kernels.use("torch"):
        with kernels.use("triton"):
            assert _dispatch._chosen == ["triton"]
        assert _dispatch._chosen == ["torch"]
        kernels.use("auto")
        assert _dispatch._chosen == ["auto"]
    assert _dispatch._chosen == ["auto"]
    with pytest.raises(ZeroDivisionError), kernels.use("torch"):
        _ = 1 / 0
    assert _dispatch._chosen == ["auto"]


@pytest.mark.parametrize("given", ["cuda", "", None])
def test_an_unknown_backend_is_refused(given):
    with pytest.raises(ConfigError, match="give one of auto, torch, triton"):
        kernels.use(given)
    assert _dispatch._chosen == ["auto"]


def test_a_graph_takes_the_choice_of_its_call():
    graph = torch.compile(lambda x: topk_sorted(x, 2), fullgraph=True, backend="aot_eager")
    assert graph(X).tolist() == [[0, 2]]
    assert kernels.stats() == {}


def test_subclasses_are_left_to_torch(monkeypatch):
    class Mine(torch.Tensor):
        pass

    monkeypatch.setattr(_dispatch, "INTERPRETING", True)
    monkeypatch.setattr(_dispatch, "_MISSING", None)
    with kernels.use("triton"), pytest.raises(UnsupportedError, match="a Mine, not a plain"):
        topk_sorted(X.as_subclass(Mine), 1)


@pytest.mark.parametrize(
    ("found", "said"), [("3.5.1", "triton is 3.5.1"), (None, "not installed"), ("3.10.0", None)]
)
def test_what_is_missing_is_said(found, said, monkeypatch):
    def version(name):
        if found is None:
            raise _dispatch.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(_dispatch, "version", version)
    reason = _dispatch._missing()
    assert reason is None if said is None else said in str(reason)
