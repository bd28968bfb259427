from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.greedy_select import Mode, greedy_select
from vtprune.kernels.topk_sorted import ranked


def naive(x: Tensor, relevance: Tensor, k: int, weight: float) -> list[int]:
    """Picks of one image by the definition, in float64."""
    x, relevance = x.double(), relevance.double()
    span = relevance.max() - relevance.min()
    relevance = (relevance - relevance.min()) / span if span else torch.zeros_like(relevance)
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = unit @ unit.t()
    picks: list[int] = []
    while len(picks) < k:
        left = [i for i in range(len(x)) if i not in picks]
        like = {i: max((float(cosine[i, j]) for j in picks), default=0.0) for i in left}
        picks.append(max(left, key=lambda i: (float(relevance[i]) - weight * like[i], -i)))
    return picks


@pytest.mark.parametrize("n", [n for n in SIZES if n < 100] + [40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_matches_the_definition(n: int, dtype: torch.dtype, gram_bytes: int) -> None:
    x, relevance = normal(3, n, 12, dtype=dtype), normal(3, n, seed=5, dtype=dtype) * 40 - 7
    for k in {0, 1, n // 2, n}:
        for weight in (0.3, 2.0):
            got = greedy_select(
                x, k, "mmr", relevance=relevance, weight=weight, gram_bytes=gram_bytes
            )
            want = [naive(row, relevance[b], k, weight) for b, row in enumerate(x)]
            assert got.tolist() == want


def test_the_default_weight_is_that_of_the_source() -> None:
    x, relevance = normal(2, 40, 6), normal(2, 40, seed=5)
    got = greedy_select(x, 20, "mmr", relevance=relevance)
    assert torch.equal(got, greedy_select(x, 20, "mmr", relevance=relevance, weight=0.3))
    assert not torch.equal(got, greedy_select(x, 20, "mmr", relevance=relevance, weight=0.0))


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_without_weight_the_most_relevant_are_picked(gram_bytes: int) -> None:
    x, relevance = normal(2, 50, 6), (normal(2, 50, seed=5) * 3).round()  # many are equal
    relevance[0] *= 1e-9
    relevance[0, 7] = 1.0  # scaled by this one and its low, most of the others would be equal
    relevance[0, 9] = -1.0
    relevance[1, 4] = -0.0
    got = greedy_select(x, 50, "mmr", relevance=relevance, weight=0.0, gram_bytes=gram_bytes)
    assert torch.equal(got, ranked(relevance))


def test_equal_relevance_leaves_the_cosines_to_decide() -> None:
    x = normal(1, 20, 6)
    got = greedy_select(x, 20, "mmr", relevance=torch.full((1, 20), 1e6))
    assert got[0].tolist() == naive(x[0], torch.zeros(20), 20, 0.3)


def test_the_scale_of_relevance_does_not_matter() -> None:
    x, relevance = normal(2, 30, 6).double(), normal(2, 30, seed=5).double()
    other = relevance * torch.tensor([[1e-3], [1e3]]).double() - 5
    got = greedy_select(x, 15, "mmr", relevance=relevance)
    assert torch.equal(got, greedy_select(x, 15, "mmr", relevance=other))


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_broken_tokens_come_last_and_touch_no_other(gram_bytes: int) -> None:
    x, relevance = normal(2, 12, 8), normal(2, 12, seed=5)
    x[0, 3, 2], relevance[0, 5], relevance[0, 7] = float("nan"), float("nan"), float("inf")
    for weight in (0.0, 0.3):
        got = greedy_select(x, 12, "mmr", relevance=relevance, weight=weight, gram_bytes=gram_bytes)
        assert got[0, -3:].tolist() == [3, 5, 7]
        sound = [i for i in range(12) if i not in (3, 5, 7)]
        want = naive(x[0, sound], relevance[0, sound], 9, weight)
        assert [sound[i] for i in want] == got[0, :9].tolist()
        assert got[1].tolist() == naive(x[1], relevance[1], 12, weight)


def test_nothing_but_broken_tokens() -> None:
    nan = torch.full((1, 4), float("nan"))
    assert greedy_select(normal(1, 4, 3), 4, "mmr", relevance=nan).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_out_of_range(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"weight={weight}; give a finite number"):
        greedy_select(normal(1, 5, 4), 2, "mmr", relevance=torch.ones(1, 5), weight=weight)


def test_what_the_mode_takes() -> None:
    x = normal(2, 5, 4)
    with pytest.raises(ConfigError, match="mode 'mmr' needs relevance="):
        greedy_select(x, 2, "mmr")
    with pytest.raises(InputError, match=r"relevance is \[2, 4\]"):
        greedy_select(x, 2, "mmr", relevance=torch.ones(2, 4))


def given(mode: Mode, batch: int, n: int) -> dict[str, Any]:
    """What a mode takes besides the features."""
    if mode == "max_sum":
        return {"pivot": torch.arange(batch) % n}
    return {} if mode == "max_min" else {"relevance": normal(batch, n, seed=5).sigmoid()}


MODES: tuple[Mode, ...] = ("max_min", "max_sum", "mmr", "dpp")


@pytest.mark.slow
@pytest.mark.parametrize("gram_bytes", [1, 23 * 23 * 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_every_mode(mode: Mode, gram_bytes: int) -> None:
    x, more = normal(2, 23, 30), given(mode, 2, 23)

    torch.compiler.reset()  # else the modes are too many variants of one function

    def pick(x: Tensor) -> Tensor:
        return greedy_select(x, 9, mode, gram_bytes=gram_bytes, **more) * 2

    assert torch.equal(torch.compile(pick, fullgraph=True, backend="aot_eager")(x), pick(x))


def test_a_graph_takes_a_pivot_out_of_range_as_the_nearest_in_range() -> None:
    x, pivot = normal(2, 9, 5), torch.tensor([-4, 30])

    def pick(x: Tensor, pivot: Tensor) -> Tensor:
        return greedy_select(x, 3, "max_sum", pivot=pivot)

    got = torch.compile(pick, fullgraph=True, backend="aot_eager")(x, pivot)
    assert got.tolist() == pick(x, torch.tensor([0, 8])).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_no_pick_needs_no_token(mode: Mode) -> None:
    assert greedy_select(normal(2, 5, 4), 0, mode, **given(mode, 2, 5)).shape == (2, 0)
    assert greedy_select(normal(0, 5, 4), 3, mode, **given(mode, 0, 5)).shape == (0, 3)
    if mode != "max_sum":  # there is no pivot among no tokens
        nothing = {name: value[:, :0] for name, value in given(mode, 2, 1).items()}
        assert greedy_select(normal(2, 0, 4), 0, mode, **nothing).shape == (2, 0)
