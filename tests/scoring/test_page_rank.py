"""Page rank, heads and likeness against loops in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune.scoring.page_rank import among, over_heads, page_rank, unlike


def attention(batch: int = 2, heads: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, length, generator=generator).mul(2).softmax(-1)


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("boosted", [False, True])
def test_votes_go_round(rounds: int, boosted: bool) -> None:
    maps = attention()
    found = page_rank(maps, rounds, boosted)
    for b in range(2):
        for h in range(3):
            s = torch.ones(9, dtype=torch.float64)
            s[0] = 9**0.5 if boosted else 1.0
            s = s / s.sum()
            for _ in range(rounds):
                s = torch.tensor(
                    [sum(float(maps[b, h, i, j]) * float(s[i]) for i in range(9)) for j in range(9)]
                )
            torch.testing.assert_close(found[b, h], s.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))


def test_rows_need_not_be_whole() -> None:
    maps = attention()
    torch.testing.assert_close(page_rank(maps * 0.3, 4, True), page_rank(maps, 4, True))
    maps[0, 0, 2] = float("nan")
    assert page_rank(maps, 4, True).isfinite().all()


def test_heads_that_tell_nothing_or_one_token_do_not_count() -> None:
    flat = torch.full((8,), 1 / 8)
    peak = torch.tensor([0.93] + [0.01] * 7)
    slope = torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    other = slope.flip(0)
    votes = torch.stack([torch.stack([flat, peak, slope, other]), torch.stack([flat, peak] * 2)])
    found = over_heads(votes)
    expected = torch.stack(
        [
            ((slope.square() + other.square()) / 2).sqrt() * 8,
            ((flat.square() + peak.square()) / 2).sqrt() * 8,  # all heads, where none is good
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        over_heads(votes[:1, :3], (0.0, 0.0))[0], torch.ones(8), rtol=1e-5, atol=2e-6
    )


def test_those_of_the_less_important_half_that_resemble_the_other_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, importance = torch.randn(2, 15, 4, generator=generator), torch.rand(2, 15)
    left = unlike(keys, importance, 4)
    x = torch.nn.functional.normalize(keys.double(), dim=-1)
    for b in range(2):
        order = sorted(range(15), key=lambda i: -float(importance[b, i]))
        more, less = order[:8], order[8:]
        best = {i: max(float(x[b, i] @ x[b, j]) for j in more) for i in less}
        gone = sorted(less, key=lambda i: -best[i])[:4]
        assert left[b].tolist() == [i for i in range(15) if i not in gone]


def test_of_equal_keys_the_last_leave_and_broken_ones_first() -> None:
    keys = torch.ones(1, 8, 3)
    assert unlike(keys, torch.ones(1, 8), 2).tolist() == [[0, 1, 2, 3, 4, 5]]
    keys[0, 5] = float("nan")
    assert unlike(keys, torch.ones(1, 8), 2).tolist() == [[0, 1, 2, 3, 4, 6]]


def test_maps_among_those_left() -> None:
    maps = attention()
    left = torch.tensor([[0, 3, 6], [1, 2, 5]])
    found = among(maps, left, 2)
    for b, row in enumerate([[0, 1, 2, 5, 8], [0, 1, 3, 4, 7]]):
        assert torch.equal(found[b], maps[b][:, row][:, :, row])
