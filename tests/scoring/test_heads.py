"""What SpAtten leaves out of attention: heads and bits."""

from __future__ import annotations

import torch

from vtprune.scoring.heads import given_by, important, n_left, progressive, rounded


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_heads_are_counted_up_and_one_always_stays() -> None:
    assert [n_left(share, 12) for share in (1.0, 0.75, 0.7, 1e-9)] == [12, 9, 9, 1]


def test_the_heads_that_gave_most_stay_of_those_still_there() -> None:
    total = torch.tensor([[5.0, 1.0, 3.0, 3.0], [1.0, 9.0, 2.0, 3.0]])
    alive = torch.tensor([[True] * 4, [True, False, True, True]])
    assert important(total, alive, 2).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert important(total, alive, 4).int().tolist() == alive.int().tolist()


def test_what_a_head_gave_is_its_absolute_sum_without_padding() -> None:
    out = drawn(2, 3, 5, 4)
    whole = out.double().abs().sum((2, 3)).float()
    torch.testing.assert_close(given_by(out, None), whole)
    real = torch.arange(5) < torch.tensor([[5], [2]])
    torch.testing.assert_close(given_by(out, real)[0], whole[0])
    torch.testing.assert_close(given_by(out, real)[1], out[1, :, :2].abs().sum((1, 2)))


def test_few_bits_are_the_first_of_many() -> None:
    x = drawn(2, 3, 50, 8)
    coarse, fine = rounded(x, 4, 4)
    step = x.abs().amax((2, 3), keepdim=True) / 127
    assert ((fine - x).abs() <= step * 0.5001).all()
    assert ((fine - coarse >= -1e-6) & (fine - coarse <= step * 15.001)).all()
    assert len(coarse[0, 0].unique()) <= 16
    assert len(fine[0, 0].unique()) > 16
    ints = (coarse / step).round()
    assert (ints % 16 == 0).all()


def test_more_bits_are_read_where_attention_is_flat() -> None:
    q, k, none = drawn(1, 2, 20, 8), drawn(1, 2, 20, 8) + 0.1, torch.zeros(())
    never, always = (progressive(q, k, (4, 4), flat, none) for flat in (0.0, 1.1))
    some = progressive(q, k, (4, 4), 0.3, none)
    sharp = never.amax(-1) >= 0.3
    assert sharp.any() and not sharp.all()
    assert torch.equal(some[sharp], never[sharp])
    assert torch.equal(some[~sharp], always[~sharp])
    exact = (q @ k.mT * 8**-0.5).softmax(-1)
    assert (always - exact).abs().max() < (never - exact).abs().max()
    assert (progressive(q, k, (12, 4), 0.0, none) - exact).abs().max() < 5e-3
