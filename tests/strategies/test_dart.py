from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError, InputError
from vtprune.registry import build
from vtprune.types import Budget, Inside, KeyNorm, Normed, Signals


def signals(n: int, *, starts: tuple[int, ...] = (3,)) -> Signals:
    """Tokens on a circle, the later the longer their keys; two texts, alike the first two."""
    angle = torch.arange(n) / n * 6.28
    states = torch.stack([angle.cos(), angle.sin()], dim=1)
    after = {KeyNorm(1): torch.tensor([1.0, 2.0]), Normed(2): states[:2]}
    values = {KeyNorm(1): torch.arange(n).float()[None], Normed(2): states[None]}
    return Signals(states[None], values=values, inside=Inside(0, (2,), 8, (n,), starts, (after,)))


def test_pivots_come_first_and_each_takes_its_opposite() -> None:
    strategy = build("dart", visual=1, text=1)
    kept = vtprune.select(strategy, keep=3, signals=signals(12)).rows[0].tolist()
    assert kept == [5, 7, 11]  # the longest keys; opposite of 11; opposite of 1, which text 1 is


def test_a_budget_below_the_pivots_and_no_text_behind() -> None:
    assert vtprune.select("dart", keep=2, signals=signals(12)).rows.tolist() == [[10, 11]]
    bare = signals(12)
    bare.inside = None
    assert vtprune.select("dart", keep=7, signals=bare).rows.shape == (1, 7)


def test_the_authors_count() -> None:
    authors = build("dart", compat=True)
    counts = [authors.counts(signals(576), Budget.of(k))[0] for k in (128, 64, 7, 576)]
    assert counts == [132, 68, 4, 576]
    assert authors.counts(signals(40), Budget.of(39)) == [36]  # no more than there are besides


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="visual=0 must be a count of at least 1"):
        build("dart", visual=0)
    with pytest.raises(ConfigError, match="text=-1"):
        build("dart", text=-1)
    with pytest.raises(InputError, match=r"needs signals\.inside\.starts"):
        vtprune.select("dart", keep=6, signals=signals(30, starts=()), compat=True)
