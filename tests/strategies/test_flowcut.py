"""FlowCut: where it acts, how many leave at a stage, and what couples rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import Budget, Facts, Flow, Inside, LastFlow, Signals, Site

CLIP = Facts(24, 22, True, Facts.signals_of(cls_row=True))
NEXT = replace(CLIP, decoder_layers=32)  # images of any number of tokens
LLAVA = replace(NEXT, n_tokens=576)


def signals(relation: Tensor, stage: int, item: list[int] | None = None) -> Signals:
    """At a stage of three, after blocks 1, 3 and 5, of tiles that had 8 patches."""
    batch, n = relation.shape
    flow = torch.stack([relation, torch.arange(n).expand(batch, n).float()], dim=-1)
    return Signals(
        torch.zeros(batch, n, 1),
        item=None if item is None else torch.tensor(item),
        values={Flow(0): torch.zeros_like(flow), Flow(1): flow},
        inside=Inside(stage, (1, 3, 5), 8, (8,) * batch),
    )


def test_it_acts_after_every_second_block_up_to_the_one_before_the_features() -> None:
    stages = build("flowcut").plan(CLIP)
    assert [stage.layer for stage in stages] == list(range(1, 22, 2))
    assert {stage.site for stage in stages} == {Site.ENCODER}
    assert stages[2].needs == tuple(Flow(layer) for layer in range(6))
    odd = replace(CLIP, vision_layers=27, feature_block=25)
    assert [stage.layer for stage in build("flowcut").plan(odd)] == list(range(0, 25, 2))
    chosen = build("flowcut", layers=(2, 5, 7, 9)).plan(CLIP)
    assert [stage.layer for stage in chosen] == [5, 7, 9]
    assert chosen[0].needs == (Flow(2), Flow(5))


def test_a_tower_of_one_block_has_one_stage() -> None:
    (stage,) = build("flowcut").plan(replace(CLIP, vision_layers=1, feature_block=0))
    assert stage.layer == 0


def test_it_acts_after_the_projector_where_a_token_is_made_of_several_patches() -> None:
    facts = replace(CLIP, in_tower=False, feature_block=23, full_blocks=(7, 15, 23))
    (stage,) = build("flowcut").plan(facts)
    assert stage.site is Site.PROJECTOR
    assert stage.needs == (Flow(7), Flow(15), Flow(23))


def test_the_schedule_by_hand() -> None:
    # Half of the 8 have all the attention, evenly: entropy log 4 of log 8, so 1 - (2/3)^2 = 5/9.
    relation = torch.tensor([[1.0, 0.0] * 4])
    budget = Budget.of(2)
    for stage, left in {
        0: 8 - round(6 / 2 * 5 / 9),
        1: 8 - round(6 / 2**0.5 * 5 / 9),
        2: 2,
    }.items():
        assert build("flowcut").counts(signals(relation, stage), budget) == [left]
    assert build("flowcut").counts(signals(relation, 1), Budget.of(8)) == [8]
    assert build("flowcut").counts(signals(relation[:, :6], 2), Budget.of(0.5)) == [4]


def test_tiles_of_one_image_lose_equally_many_and_images_only_under_compat() -> None:
    relation = torch.tensor([[1.0] * 8, [1.0] + [0.0] * 7, [1.0] * 8])
    given, budget = signals(relation, 1, item=[0, 0, 1]), Budget.of(2)
    peak = 8 - round(6 / 2**0.5)
    assert build("flowcut").counts(given, budget) == [peak, peak, 8]
    assert build("flowcut", compat=True).counts(given, budget) == [peak] * 3
    assert build("flowcut").counts(signals(relation, 1), budget) == [8, peak, 8]


def test_without_blocks_to_come_it_keeps_the_budget_by_the_running_score() -> None:
    given = replace(signals(torch.ones(1, 8), 0), inside=None)
    assert vtprune.select("flowcut", keep=3, signals=given).rows.tolist() == [[5, 6, 7]]


def test_nan_does_not_break_a_count() -> None:
    relation = torch.full((1, 8), float("nan"))
    (count,) = build("flowcut").counts(signals(relation, 1), Budget.of(2))
    assert 2 <= count <= 8


def test_layers_beyond_the_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        build("flowcut", layers=(23,)).plan(CLIP)


def test_the_last_stage_is_in_the_language_model_and_the_others_leave_twice_the_budget() -> None:
    *tower, last = build("flowcut").plan(NEXT)
    assert [stage.layer for stage in tower] == list(range(1, 22, 2))
    assert {stage.times for stage in tower} == {2}
    assert (last.site, last.layer, last.needs, last.times) == (Site.DECODER, 2, (LastFlow(1),), 1)
    several = replace(NEXT, in_tower=False, feature_block=23, decoder_layers=48, first_stage=4)
    after, last = build("flowcut").plan(several)
    assert (after.site, after.times) == (Site.PROJECTOR, 2)
    assert (last.layer, last.needs) == (4, (LastFlow(3),))


@pytest.mark.parametrize(
    ("facts", "inside", "there"),
    [
        (NEXT, None, True),
        (NEXT, False, False),
        (LLAVA, None, False),
        (LLAVA, True, True),
        (CLIP, None, False),
        (replace(NEXT, decoder_layers=1), None, False),
    ],
)
def test_whether_tokens_leave_in_the_language_model(facts, inside, there) -> None:
    stages = build("flowcut", inside=inside).plan(facts)
    assert [stage.site for stage in stages].count(Site.DECODER) == there
    assert {stage.times for stage in stages if stage.site is Site.ENCODER} == {1 + there}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_language_model_without_such_a_layer_is_refused(depth) -> None:
    with pytest.raises(ConfigError, match=r"inside=True: .* no layer .* leave it out"):
        build("flowcut", inside=True).plan(replace(LLAVA, decoder_layers=depth))
    with pytest.raises(ConfigError, match="'yes' must be True, False or None"):
        build("flowcut", inside="yes")


def sample(n: int, *images: tuple[int, ...]) -> Signals:
    """In the language model, of rows with ``n`` tokens left of images of these sizes."""
    score = torch.arange(n).expand(len(images), n).float()
    return Signals(
        torch.zeros(len(images), n, 1),
        values={LastFlow(1): -score},
        inside=Inside(0, (2,), 32, (n,) * len(images), images=images),
    )


def test_a_sample_keeps_what_its_images_may_keep() -> None:
    given = sample(16, (30, 7), (10, 3, 3), (576,))
    assert build("flowcut").counts(given, Budget.of(4)) == [8, 10, 4]
    assert build("flowcut").counts(given, Budget.of(8)) == [15, 14, 8]
    assert build("flowcut").counts(given, Budget.of(0.3)) == [11, 5, 16]  # of each image, rounded
    assert build("flowcut").counts(given, Budget.of(1.0)) == [16, 16, 16]
    assert build("flowcut").counts(given.rows(torch.tensor([1])), Budget.of(4)) == [10]


def test_there_it_keeps_the_largest_flow_to_the_last_token() -> None:
    assert vtprune.select("flowcut", keep=3, signals=sample(8, (8,))).rows.tolist() == [[0, 1, 2]]


def test_twice_a_budget() -> None:
    assert Budget.of(64).times(2) == Budget.of(128)
    assert Budget.of(0.3).times(2) == Budget.of(0.6)
    assert Budget.of(0.7).times(2) == Budget.of(1.0)
    assert Budget.of(0.7).times(1) == Budget.of(0.7)
