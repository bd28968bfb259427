"""PiToMe: where it acts, by which margin, and faults that the recorded cases must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.strategies.recorded import turns_red
from vtprune.registry import build
from vtprune.scoring import energy
from vtprune.strategies import pitome
from vtprune.strategies.pitome import PiToMe
from vtprune.types import Facts, Inside, Keys, Signals

CLIP = Facts(24, 22, True, Facts.signals_of(cls_row=True))


def at(layer: int, depth: int = 12) -> Signals:
    return Signals(torch.zeros(1, 9, 1), inside=Inside(0, (layer,), depth, (9,)))


def test_it_acts_in_every_block_and_weighs_if_told() -> None:
    stages = build("pitome").plan(CLIP)
    assert [stage.layer for stage in stages] == list(range(23))
    assert [stage.needs for stage in stages] == [(Keys(layer),) for layer in range(23)]
    assert all(s.before_mlp and not s.proportional for s in stages)
    stages = build("pitome", metric="states", prop_attn=True).plan(CLIP)
    assert all(s.proportional and s.needs == () for s in stages)
    (stage,) = build("pitome").plan(replace(CLIP, in_tower=False))
    assert stage.needs == (Keys(22),)


def test_margin_and_way_of_pairing_change_with_the_blocks() -> None:
    assert PiToMe().at(at(0)) == (0.75, False)
    assert PiToMe().at(at(5))[1] is False
    assert PiToMe().at(at(6)) == (0.375, True)
    assert PiToMe().at(at(6, 13))[1] is False  # the first 7 of 13
    assert PiToMe().at(at(8))[0] == pytest.approx(0.25)
    assert PiToMe(metric="states").at(at(3))[0] == pytest.approx(0.7125)
    assert PiToMe(margin=0.5, bsm=0.0).at(at(0)) == (0.5, True)
    bare = replace(at(0), inside=None)
    assert PiToMe().at(bare) == (0.75, True)
    assert PiToMe(bsm=1.0).at(bare) == (0.75, False)


def test_those_of_low_energy_are_spared_by_hand() -> None:
    # Three alike and two alike; 0 and 6 are like nothing.
    keys = torch.eye(4)[[0, 1, 1, 1, 2, 2, 3]][None]
    signals = Signals(torch.arange(7.0)[None, :, None], values={Keys(0): keys})
    made = vtprune.select("pitome", keep=5, signals=signals)
    # By energy 1, 2, 3, 4: 1 goes into 2, and 3 into the first of 2 and 4 that is most like it.
    assert made.rows.tolist() == [[0, 2, 4, 5, 6]]
    assert made.apply(signals.tokens).flatten().tolist() == [0.0, 2.0, 4.0, 5.0, 6.0]
    assert made.total(torch.ones(1, 7)).tolist() == [[1.0, 3.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    "options",
    [{"metric": "values"}, {"margin": 2.0}, {"margin": float("nan")}, {"alpha": -1}, {"bsm": 1.5}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.ConfigError, match=f"{next(iter(options))}="):
        build("pitome", **options)


def unshifted(similarity: Tensor, margin: float, alpha: float) -> Tensor:
    return similarity.mean(-1)


def all_take_part(metric: Tensor, r: int, margin: float, alpha: float, protect: bool) -> Any:
    return energy.match_by_energy(metric, r, margin, alpha, False)


def only_some_take_part(metric: Tensor, r: int, margin: float, alpha: float, protect: bool) -> Any:
    return energy.match_by_energy(metric, r, margin, alpha, True)


@pytest.mark.parametrize(
    ("where", "name", "fault", "cases"),
    [
        (energy, "energies", unshifted, {"c3_clip_form_r0925"}),
        (pitome, "match_by_energy", all_take_part, {"c3_clip_form_r0925"}),
        (pitome, "match_by_energy", only_some_take_part, {"c2_bsm_r085_sizes"}),
    ],
)
def test_faults_turn_the_recorded_cases_red(
    where: Any, name: str, fault: Any, cases: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_red("pitome", where, name, fault, cases, monkeypatch)
