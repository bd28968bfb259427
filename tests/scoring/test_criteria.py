"""Matching by several criteria against a loop in double precision, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.scoring import criteria
from vtprune.scoring.criteria import Temperatures, Traits, match_both_ways, merge_both_ways
from vtprune.scoring.matching import averaged


def traits(n: int, seed: int = 0, batch: int = 2) -> Traits:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 6, (batch, n), generator=generator).float()
    received = torch.randn(batch, n, generator=generator).softmax(-1)
    tokens = torch.randn(batch, n, 6, generator=generator)
    return Traits(tokens, received, size, received * size)


def by_loops(
    row: int, t: Traits, r: int, p: int, taus: tuple[float, float, float], both: bool
) -> dict[int, int]:
    """What each token of one image goes into, by its place: the product of powers, pair by pair."""
    x, n = t.tokens[row].double(), t.tokens.shape[1]
    rare = 1 / t.received[row].double()
    few = 1 / t.size[row].double()
    rare, few = rare / rare.max(), few / few.max()

    def good(i: int, j: int) -> float:
        cosine = float(torch.cosine_similarity(x[i], x[j], dim=0))
        powers = ((cosine + 1) / 2) ** (1 / taus[0]) * float(rare[i] * rare[j]) ** (1 / taus[1])
        return powers * float(few[i] * few[j]) ** (1 / taus[2])

    even = [i for i in range(n) if (i + p) % 2 == 0]
    odd = [i for i in range(n) if (i + p) % 2]
    into = {i: i for i in range(n)}
    best = {i: max(odd, key=lambda j: good(i, j)) for i in even}
    first = sorted(even, key=lambda i: -good(i, best[i]))[: r // 2 if both else r]
    into |= {i: best[i] for i in first}
    left = [i for i in even if i not in first]
    back = {j: max(left, key=lambda i: good(i, j)) for j in odd} if left else {}
    second = sorted(back, key=lambda j: -good(back[j], j))[: r - r // 2 if both else 0]
    into |= {j: back[j] for j in second}
    return {i: into[into[i]] for i in into}


CASES: list[tuple[int, int, int, tuple[float, float, float], bool]] = [
    (21, 8, 1, (1.0, 20.0, 40.0), True),
    (20, 10, 0, (1.0, 2.0, 3.0), True),
    (20, 7, 2, (0.5, 1.0, 1.0), True),
    (21, 10, 1, (1.0, 20.0, 40.0), False),
    (2, 1, 1, (1.0, 20.0, 40.0), True),
]


def same_as_loops() -> bool:
    for n, r, p, taus, both in CASES:
        t = traits(n, n + r)
        rows, into = match_both_ways(t, r, p, Temperatures(*taus), both)
        places = rows.gather(1, into)
        for row in range(2):
            expected = by_loops(row, t, r, p, taus, both)
            if places[row].tolist() != [expected[i] for i in range(n)]:
                return False
    return True


def test_pairs_are_those_of_the_product_of_powers() -> None:
    assert same_as_loops()


def test_those_at_even_places_come_first_each_half_in_order() -> None:
    rows, _ = match_both_ways(traits(21), 8, 1, Temperatures())
    for row in rows.tolist():
        even = [i for i in row if (i + 1) % 2 == 0]
        assert row == sorted(even) + sorted(set(row) - set(even))


@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_any_count_is_reached_and_nothing_is_lost(k: int) -> None:
    t = traits(21)
    rows, into = merge_both_ways(t, k, 1, Temperatures())
    assert rows.shape == (2, k)
    assert torch.equal(into.gather(1, rows), torch.arange(k).expand(2, k))
    chosen = averaged(rows, into, t.weight)
    assert torch.equal(chosen.total(t.size).sum(1), t.size.sum(1))
    weight = t.weight.double()[..., None]
    for b in range(2):
        for j in range(k):
            mine = (into[b] == j).nonzero()[:, 0]
            mean = (weight[b, mine] * t.tokens[b, mine]).sum(0) / weight[b, mine].sum()
            torch.testing.assert_close(chosen.apply(t.tokens)[b, j], mean.float())


def test_broken_tokens_merge_with_none_while_there_are_others() -> None:
    t = traits(12)
    t.tokens[0, 4], t.received[1, 7] = float("nan"), float("inf")
    rows, into = match_both_ways(t, 4, 0, Temperatures())
    for row, broken in ((0, 4), (1, 7)):
        assert broken in rows[row].tolist()
        assert int((into[row] == into[row, broken]).sum()) == 1


def one_way(similarity: Tensor, r: int, closest: Any = criteria.closest) -> tuple[Tensor, Tensor]:
    return closest(-similarity, r)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("closest", one_way),
        ("halves", lambda n, p, device: (torch.arange(n)[::2], torch.arange(n)[1::2])),
        ("TINY", 1.0),
    ],
)
def test_faults_are_noticed(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, name, fault)
    assert not same_as_loops()
