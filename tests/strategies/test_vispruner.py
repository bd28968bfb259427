"""VisPruner: the two parts of the budget."""

from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import ClsRow, Facts, Signals, Site


def signals_of(score: list[float], like: dict[int, int]) -> Signals:
    """One-hot tokens, of which some equal others."""
    tokens = torch.eye(len(score))
    for i, j in like.items():
        tokens[i] = tokens[j]
    return Signals(tokens[None], values={ClsRow(22): torch.tensor([score])})


def test_repeated_tokens_leave():
    # 3 and 0 stay by attention; of 5, 1, 4, 2 the tokens 5 and 4 are compared with 1 and 2.
    signals = signals_of([0.8, 0.6, 0.1, 0.9, 0.2, 0.7], like={4: 2})
    assert vtprune.select("vispruner", keep=5, signals=signals).rows.tolist() == [[0, 1, 2, 3, 5]]


@pytest.mark.parametrize("k", [1, 4, 7])
def test_all_by_attention_is_fastervlm(k):
    score = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    signals = Signals(torch.randn(2, 16, 4), values={ClsRow(22): score})
    chosen = vtprune.select("vispruner", keep=k, signals=signals, important=1.0)
    assert torch.equal(chosen.rows, vtprune.select("fastervlm", keep=k, signals=signals).rows)


def test_similarity_is_that_of_the_tower_where_a_token_is_a_patch():
    for in_tower, site in ((True, Site.ENCODER), (False, Site.PROJECTOR)):
        facts = Facts(24, 22, True, Facts.signals_of(cls_row=True), in_tower=in_tower)
        (stage,) = build("vispruner").plan(facts)
        assert (stage.site, stage.needs) == (site, (ClsRow(22),))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ConfigError, match="must be a share from 0 to 1"):
        build("vispruner", important=share)
