"""Means at the length of their longest token, held against loops in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.scoring.norms import norm_preserving


def test_by_hand() -> None:
    x = torch.tensor([[[4.0, 0.0], [0.0, 2.0], [0.0, 3.0]]])
    rows, into = torch.tensor([[2, 1]]), torch.tensor([[1, 1, 0]])
    made = norm_preserving(rows, into, x)
    length = 5**0.5  # of the mean (2, 1)
    wanted = torch.tensor([[[0.0, 3.0], [8 / length, 4 / length]]])
    torch.testing.assert_close(made.apply(x), wanted)
    ported = norm_preserving(rows, into, x, by_place=True).apply(x)
    torch.testing.assert_close(ported, torch.tensor([[[0.0, 3.0], [4.0, 2.0]]]))


@given(st.data())
def test_the_longest_of_a_group_says_how_long(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 20))
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(1, n, 4, generator=generator)
    rows = torch.randperm(n, generator=generator)[None, :k]
    into = torch.randint(k, (1, n), generator=generator).scatter_(1, rows, torch.arange(k)[None])
    made = norm_preserving(rows, into, x).apply(x)[0].double()
    for place in range(k):
        group = x[0, into[0] == place].double()
        mean = group.mean(0)
        wanted = mean / mean.norm() * group.norm(dim=-1).max()
        torch.testing.assert_close(made[place], wanted, rtol=1e-4, atol=1e-5)
        if len(group) == 1:
            assert torch.equal(made[place], group[0])


def test_what_has_no_direction_stays_the_plain_mean() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [float("nan"), 1.0], [2.0, 2.0]]])
    rows, into = torch.tensor([[0, 3]]), torch.tensor([[0, 0, 1, 1]])
    made = norm_preserving(rows, into, x)
    assert made.mix is not None
    assert made.mix.weight.tolist() == [[0.5] * 4]
    assert made.apply(x)[0, 0].tolist() == [0.0, 0.0]
