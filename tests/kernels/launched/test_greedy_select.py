from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.greedy_select import Mode, greedy_select

MODES: tuple[Mode, ...] = ("max_min", "max_sum", "mmr", "dpp")


def more(mode: Mode, x: Tensor) -> dict[str, Any]:
    """What a mode takes besides the features ``x``; relevance has ties."""
    b, n = x.shape[:2]
    if mode == "max_sum":
        return {"pivot": (torch.arange(b) * 5 % n).to(x.device)}
    relevance = (normal(b, n, seed=4).sigmoid() * 50).round() / 50
    return {} if mode == "max_min" else {"relevance": relevance.to(x.device)}


def expected(x: Tensor, k: int, mode: Mode, **given: Any) -> Tensor:
    with kernels.use("torch"):
        picks = greedy_select(x, k, mode, **given)
    kernels.reset_stats()
    return picks


def check(x: Tensor, k: int, mode: Mode, **given: Any) -> None:
    want = expected(x, k, mode, **given)
    got = greedy_select(x, k, mode, **given)
    assert set(kernels.stats()) == {("greedy_select", "triton")}
    assert got.tolist() == want.tolist()


def features(batch: int, n: int, width: int, device: str, dtype: torch.dtype) -> Tensor:
    """Tokens of which some are equal, opposite or zero."""
    x = normal(batch, n, width)
    x[:, n // 2] = x[:, 0]
    x[:, n // 3] = -x[:, n - 1]
    x[0, n // 4] = 0
    return x.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_picks_what_torch_picks(mode: Mode, n: int, dtype: torch.dtype, device: str) -> None:
    x = features(2, n, 200, device, dtype)
    for k in {1, n // 2, n} if n < 16 else {n // 4}:
        if k:
            check(x, k, mode, **more(mode, x))


@pytest.mark.parametrize("mode", MODES)
def test_all_of_many_tokens(mode: Mode, device: str) -> None:
    x = features(1, 70, 16, device, torch.float32)
    check(x, 70, mode, **more(mode, x))


@pytest.mark.parametrize("mode", MODES)
def test_values_are_read_in_tiles(mode: Mode, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.kernels._triton import greedy_select as module

    monkeypatch.setattr(module, "TILE", 32)
    x = features(2, 123, 16, device, torch.float32)
    check(x, 24, mode, **more(mode, x))
    x = x[:1, :1].expand(2, 70, 16)  # the first of equal ones, across tiles
    check(
        x,
        35,
        mode,
        **{
            name: value[:, :70] if value.ndim > 1 else value
            for name, value in more(mode, x).items()
        },
    )


@pytest.mark.parametrize("mode", MODES)
def test_equal_tokens_are_taken_in_order(mode: Mode, device: str) -> None:
    x = normal(1, 1, 37) * (normal(2, 33, 1, seed=1).abs() + 0.1)  # cosines of nearly 1
    x = x.to(device)
    given: dict[str, Any] = {}
    if mode == "max_sum":
        given = {"pivot": torch.zeros(2, dtype=torch.int64, device=device)}
    elif mode != "max_min":
        given = {"relevance": torch.full((2, 33), 0.7, device=device)}
    assert greedy_select(x, 33, mode, **given).tolist() == [list(range(33))] * 2


@pytest.mark.parametrize("mode", MODES)
def test_broken_tokens_come_last(mode: Mode, device: str) -> None:
    x = normal(3, 20, 32)
    x[0, 3, 2], x[0, 7, 0], x[2] = float("nan"), float("inf"), float("nan")
    x = x.to(device)
    given = more(mode, x)
    if "relevance" in given:
        given["relevance"][0, 5], given["relevance"][1, 2] = float("nan"), -0.0
    check(x, 20, mode, **given)
    last = {3, 5, 7} if "relevance" in given else {3, 7}
    assert set(greedy_select(x, 20, mode, **given)[0, -len(last) :].tolist()) == last


def test_more_picks_than_dimensions_follow_the_relevance(device: str) -> None:
    x = normal(2, 30, 40)
    x[0, :, 4:] = 0  # one image is exhausted, the other is not
    x = x.to(device)
    check(x, 30, "dpp", **more("dpp", x))


def test_relevance_alone_counts_without_weight(device: str) -> None:
    x = normal(2, 40, 8).to(device)
    relevance = (normal(2, 40, seed=2) * 3).round().to(device) * 1e-9 + 0.0
    check(x, 20, "mmr", relevance=relevance, weight=0.0)
    want = relevance.sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(greedy_select(x, 20, "mmr", relevance=relevance, weight=0.0), want)
    check(x, 20, "mmr", relevance=relevance, weight=1.5)


@pytest.mark.parametrize("mode", MODES)
def test_images_one_by_one_and_views(mode: Mode, device: str) -> None:
    x = features(6, 40, 24, device, torch.float32)
    view = x[::2, 3:37]
    check(view, 12, mode, **more(mode, view), gram_bytes=34 * 34 * 4)
    assert kernels.stats()["greedy_select", "triton"] == 3
    check(normal(2, 24, 30).to(device).mT, 12, mode, **more(mode, normal(2, 30, 24).to(device)))


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_the_kernel(mode: Mode, device: str) -> None:
    torch.compiler.reset()
    x = features(2, 33, 40, device, torch.float32)
    given = more(mode, x)

    def pick(x: Tensor) -> Tensor:
        return greedy_select(x, 9, mode, **given) * 2

    want = 2 * expected(x, 9, mode, **given)
    got = torch.compile(pick, fullgraph=True, backend="aot_eager")(x)
    assert kernels.stats() == {("greedy_select", "triton"): 1}
    assert torch.equal(got, want)


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    x = normal(2, 9, 9).to(device)
    value, first = torch.zeros(2, 9, device=device), torch.tensor([0, 4], device=device)
    op = torch.ops.vtprune.greedy_select.default
    torch.library.opcheck(op, (value, first, None, x, 4, "max_sum", 0.3))
    torch.library.opcheck(op, (value + 1, None, value + 0.5, x, 9, "dpp", 0.3))


def test_the_inputs_are_left_as_they_are(device: str) -> None:
    x = normal(2, 9, 12).to(device)
    for mode in MODES:
        given = more(mode, x)
        before = [x.clone(), *(value.clone() for value in given.values())]
        greedy_select(x, 5, mode, **given)
        for now, then in zip((x, *given.values()), before, strict=True):
            assert torch.equal(now, then)


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x = torch.ones(1, 64, 3, device=device)
    zero, ones = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, 64, device=device)
    with pytest.raises(UnsupportedError, match="no kernel for this call: features are float64"):
        greedy_select(x.double(), 30)
    with pytest.raises(UnsupportedError, match="64 tokens take more than gram_bytes=999"):
        greedy_select(x, 30, gram_bytes=999)
    with pytest.raises(UnsupportedError, match="4 picks among 64 tokens need too few cosines"):
        greedy_select(x, 4, "max_sum", pivot=zero)
    assert greedy_select(x, 4).shape == (1, 4)
    assert greedy_select(x, 5, "mmr", relevance=ones).shape == (1, 5)


def test_a_factor_that_is_too_large_is_said(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.kernels import greedy_select as module

    x, ones = torch.ones(1, 64, 3, device=device), torch.ones(1, 64, device=device)
    monkeypatch.setattr(module, "_FACTOR_BYTES", 64 * 8 * 8 * 2)
    assert greedy_select(x, 8, "dpp", relevance=ones).shape == (1, 8)
    with pytest.raises(UnsupportedError, match="a factor of 9 picks among 64 tokens"):
        greedy_select(x, 9, "dpp", relevance=ones)
