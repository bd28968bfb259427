"""ToDRE: pivot, objectives and order; the exit is in engine/test_exit.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.strategies.todre import ToDRE
from vtprune.types import ClsRow, Facts, Signals, Site, TextRows


def signals_of(score: list[float]) -> Signals:
    tokens = torch.randn(len(score), 4, generator=torch.Generator().manual_seed(7))[None]
    return Signals(tokens, values={ClsRow(23): torch.tensor([score])})


def test_the_picks_of_a_known_case():
    signals = signals_of([0.0, 0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    assert ToDRE().picks(signals, 5).tolist() == [[3, 8, 2, 4, 7]]
    assert vtprune.select("todre", keep=5, signals=signals).rows.tolist() == [[2, 3, 4, 7, 8]]


def test_the_pivot_is_in_the_thumbnail():
    signals = signals_of([0.1, 0.3, 0.2, 0.9, 0.4])
    assert ToDRE().picks(signals, 1).tolist() == [[3]]
    assert ToDRE(thumbnail=3).picks(signals, 1).tolist() == [[1]]
    assert ToDRE(thumbnail=9).picks(signals, 1).tolist() == [[3]]


def test_the_sum_goes_far_out_and_the_minimum_fills_gaps():
    degrees = torch.tensor([0.0, 165.0, 160.0, 75.0]).deg2rad()
    tokens = torch.stack([degrees.cos(), degrees.sin()], dim=1)[None]
    signals = Signals(tokens, values={ClsRow(23): torch.tensor([[1.0, 0, 0, 0]])})
    assert ToDRE().picks(signals, 3).tolist() == [[0, 1, 2]]
    assert ToDRE(objective="max_min").picks(signals, 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "maxmin"}, "objective='maxmin' is unknown; choose max_sum or max_min"),
        ({"thumbnail": 0}, "thumbnail=0 must be a count"),
        ({"thumbnail": True}, "thumbnail=True must be a count"),
        ({"tau": 1.5}, "tau=1.5 must be a share from 0 to 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build("todre", **options)


def test_the_second_stage_is_asked_for():
    llava = Facts(24, 22, True, Facts.signals_of(cls_row=True), decoder_layers=32)
    assert [stage.site for stage in build("todre").plan(llava)] == [Site.PROJECTOR]
    last = build("todre", exit=True).plan(llava)[-1]
    assert (last.site, last.layer, last.needs) == (Site.DECODER, 28, (TextRows(28),))
    with pytest.raises(ConfigError, match=r"exit=True: .* no layer .* leave it out"):
        build("todre", exit=True).plan(replace(llava, decoder_layers=1))
