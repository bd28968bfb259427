"""SparseVLM and SparseVLM+: counts, raters, heads and what is divided by distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.strategies.sparsevlm import SparseVLM
from vtprune.strategies.sparsevlm_plus import SparseVLMPlus
from vtprune.types import (
    Budget,
    EachHead,
    EachText,
    Facts,
    Inside,
    Likeness,
    Quantity,
    Signals,
    Turned,
)

LLAVA = Facts(24, 22, True, Facts.signals_of(cls_row=True), n_tokens=576, decoder_layers=32)
LAYERS = (3, 7, 16)


@pytest.mark.parametrize(
    ("name", "keep", "wanted"),
    [
        ("sparsevlm", 6608 / 32 / 576, [309, 204, 113]),  # the authors' table for 192
        ("sparsevlm_plus", 6616 / 32 / 576, [300, 200, 118]),
        ("sparsevlm", 1.0, [576, 576, 576]),
    ],
)
def test_the_counts_of_the_authors(name, keep, wanted):
    strategy, n = build(name), 576
    for stage, count in enumerate(wanted):
        signals = Signals(torch.zeros(1, n, 2), inside=Inside(stage, LAYERS, 32, (576,)))
        assert strategy.counts(signals, Budget.of(keep)) == [count]
        n = count


def test_what_is_read_where():
    stages = build("sparsevlm").plan(LLAVA)
    assert [stage.layer for stage in stages] == list(LAYERS)
    assert stages[1].needs == (Likeness(0), EachText(6))
    assert build("sparsevlm_plus").plan(LLAVA)[2].needs == (Likeness(0), EachHead(15), Turned(15))
    assert (build("sparsevlm").positions, build("sparsevlm_plus").positions) == ("renumber", "keep")
    with pytest.raises(ConfigError, match="out of reach of sparsevlm"):
        build("sparsevlm").check_budget(Budget.of(50), LLAVA)


def given(likeness: list[float], **values: Any) -> Signals:
    """One row; ``values`` by the name of their kind, those of text under ``after``."""
    after: dict[Quantity, Any] = {Likeness(0): torch.tensor(likeness), **values.pop("after", {})}
    (n,) = {len(value) for value in values.values()}
    kinds = {"EachText": EachText, "EachHead": EachHead, "Turned": Turned}
    read: dict[Quantity, Any] = {kinds[k](2): torch.tensor(v)[None] for k, v in values.items()}
    inside = Inside(0, LAYERS, 32, (n,), after=(after,))
    return Signals(torch.zeros(1, n, 1), values=read, inside=inside)


def test_only_raters_rate():
    # Two of three words are liked more than the mean; the row of the batch has room for a fourth.
    signals = given([0.4, 0.1, 0.5], EachText=[[0.1, 0.9, 0.3, 0], [0.2, 0, 0.4, 0], [0, 1, 0, 0]])
    rating = SparseVLM().rating(signals)
    torch.testing.assert_close(rating, torch.tensor([[0.2, 0.3, 0.0]]))
    pruned = vtprune.select("sparsevlm", keep=1, signals=signals, recycle=False, layers=(3,))
    assert pruned.rows.tolist() == [[1]]


def test_heads_are_chosen_by_what_they_see_of_the_image():
    ones = torch.ones(1, 2) * 2**0.5  # so that nothing is divided
    attention = [[[0.1, 0.5, 0.0]], [[0.2, 0.1, 0.1]]]  # two tokens, one word, three heads
    signals = given(
        [1.0], EachHead=attention, Turned=[[1.0, 0.0], [1.0, 0.0]], after={Turned(2): ones}
    )
    strategy = SparseVLMPlus(heads=1)
    assert strategy.best(strategy.per_head(signals)).tolist() == [[1]]
    torch.testing.assert_close(strategy.rating(signals), torch.tensor([[0.5, 0.1]]))
    torch.testing.assert_close(SparseVLMPlus(heads=2).rating(signals), torch.tensor([[0.3, 0.15]]))
    torch.testing.assert_close(SparseVLMPlus().rating(signals), torch.tensor([[0.2, 0.4 / 3]]))


def test_far_tokens_are_not_worse_off():
    near, far = [2.0, 0.0], [0.5, 0.0]  # against a word that points the same way
    signals = given(
        [1.0],
        EachHead=[[[0.4]], [[0.3]]],
        Turned=[near, far],
        after={Turned(2): torch.tensor([[2**0.5, 0.0]])},
    )
    torch.testing.assert_close(SparseVLMPlus().rating(signals), torch.tensor([[0.2, 0.6]]))
    behind = given(
        [1.0],
        EachHead=[[[0.4]], [[0.3]]],
        Turned=[near, [-0.5, 0.0]],
        after={Turned(2): torch.tensor([[2**0.5, 0.0]])},
    )
    rating = SparseVLMPlus(compat=True).rating(behind)
    torch.testing.assert_close(rating, torch.tensor([[0.2, -0.6]]))
    assert (SparseVLMPlus().rating(behind) > 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsevlm", {"ratios": (0.5, 0.6)}, "must fall"),
        ("sparsevlm", {"ratios": ()}, "must fall"),
        ("sparsevlm_plus", {"heads": 0}, "heads=0 must be a count"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


def test_more_layers_than_ratios():
    with pytest.raises(ConfigError, match="need as many ratios"):
        build("sparsevlm", layers=(3, 7, 16, 20)).plan(LLAVA)
