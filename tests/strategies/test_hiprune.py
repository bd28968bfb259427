"""HiPrune: which blocks it reads, where it acts, and what each option changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests import tiny
from tests.contracts.bank import TOWERS
from tests.engine.test_oracles import assert_masks_only
from vtprune.errors import ConfigError, InputError
from vtprune.registry import build
from vtprune.types import Facts, InstructionText, Quantity, Received, Signals, Site

SIDE = 6
N = SIDE * SIDE


def facts(depth: int, feature: int, full: tuple[int, ...] | None = None) -> Facts:
    signals = Facts.signals_of(cls_row=False)
    return Facts(depth, feature, False, signals, full_blocks=full, in_tower=full is None)


def signals(middle: torch.Tensor, deep: torch.Tensor, **others) -> Signals:
    """Signals of one image of 6 x 6 tokens."""
    values: dict[Quantity, torch.Tensor] = {Received(8): middle[None], Received(22): deep[None]}
    return Signals(torch.randn(1, N, 4), (1, SIDE, SIDE), values=values, **others)


def at(*tokens: int) -> torch.Tensor:
    """Scores that fall in the order of ``tokens``, zero elsewhere."""
    score = torch.zeros(N)
    score[list(tokens)] = torch.arange(len(tokens), 0, -1).float() / 100
    return score


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (facts(24, 22), (8, 22)),  # CLIP-L: 1-based 9, and the block of the features
        (facts(32, 31, (7, 15, 23, 31)), (15, 31)),  # Qwen2.5-VL: 1-based 16, and the last
        (facts(27, 26), (9, 26)),
        (facts(12, 11, (2, 5, 8, 11)), (5, 11)),
        (facts(4, 3, (1, 3)), (1, 3)),
        (facts(4, 3, (3,)), (3,)),  # one block gives signals: it is both
        (facts(3, 1), (0, 1)),  # 1 is the nearest to a third, but it is the deep one
        (facts(2, 0), (0,)),
    ],
)
def test_the_blocks_that_it_reads(model: Facts, layers: tuple[int, ...]) -> None:
    assert build("hiprune").used_layers(model) == layers
    assert build("hiprune").needs(model) == tuple(Received(layer) for layer in layers)


def test_it_acts_after_the_projector_and_may_read_the_instruction() -> None:
    for plus in (False, True):
        (stage,) = build("hiprune", plus=plus).plan(TOWERS["with CLS"])
        assert stage.site is Site.PROJECTOR
        assert (InstructionText() in stage.needs) is plus


def test_an_anchor_stays_with_its_neighbours() -> None:
    given = signals(at(14), at(35, 34, 33, 32, 31, 30))
    kept = vtprune.select("hiprune", keep=8, signals=given, alpha=0.5)  # one anchor
    assert kept.rows.tolist() == [[8, 13, 14, 15, 20, 33, 34, 35]]


def test_a_chosen_token_is_not_chosen_again_whatever_its_score() -> None:
    given = signals(at(14), 1000 * at(14, 8, 13, 35, 34))
    kept = vtprune.select("hiprune", keep=6, signals=given, alpha=0.5)
    assert kept.rows.tolist() == [[8, 13, 14, 15, 20, 35]]


def test_too_small_a_budget_keeps_the_anchors_and_what_is_around_the_best() -> None:
    given = signals(at(28, 7), at(35))
    kept = vtprune.select("hiprune", keep=8, signals=given, alpha=1.0)  # round(1.6) = 2 anchors
    # of 28: 27, 29, 22, 34; of 7: 6, 8 (left and right), then 1 and 13 do not fit
    assert kept.rows.tolist() == [[6, 7, 8, 22, 27, 28, 29, 34]]


def test_rows_do_not_run_into_each_other_but_in_the_official_code() -> None:
    given = signals(at(12), at(35, 34, 33))  # first of its row
    sane = vtprune.select("hiprune", keep=7, signals=given, alpha=0.5)
    official = vtprune.select("hiprune", keep=7, signals=given, alpha=0.5, compat=True)
    assert sane.rows.tolist() == [[6, 12, 13, 18, 33, 34, 35]]
    assert official.rows.tolist() == [[6, 11, 12, 13, 18, 34, 35]]


def test_without_a_grid_the_anchors_stay_alone() -> None:
    given = replace(signals(at(12), at(35, 34, 33, 32, 31)), grid=None)
    kept = vtprune.select("hiprune", keep=6, signals=given, alpha=0.5)
    assert kept.rows.tolist() == [[12, 31, 32, 33, 34, 35]]


def with_text() -> Signals:
    """Tokens 1 to 10 point ever less to where the mean of the two words does."""
    given = signals(at(1, 2), at(1, 2, 3, 4), text=[torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]])])
    given.tokens = torch.zeros(1, N, 4)
    given.tokens[0, :, 2] = 1.0
    given.tokens[0, 1:11, :2] = torch.arange(10, 0, -1).float()[:, None]
    return given


def test_the_instruction_chooses_a_share_of_the_budget() -> None:
    kept = vtprune.select("hiprune", keep=10, signals=with_text(), plus=True, beta=0.4, alpha=0.0)
    # 6 by the deep block: 1, 2, 3, 4, then ties from 0 on; 4 by text: 6, 7, 8, 9
    assert kept.rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]


def test_the_words_count_by_their_mean() -> None:
    given = with_text()
    assert given.text is not None
    given.tokens[0, 20] = torch.tensor([1.0, 0, 0, 0])
    given.text = [torch.tensor([[30.0, 0, 0, 0], [0, 1, 0, 0]])]  # the mean is near the first
    kept = vtprune.select("hiprune", keep=5, signals=given, plus=True, beta=0.2, alpha=0.0)
    assert 20 in kept.rows[0]


@pytest.mark.parametrize(("keep", "kept"), [(10, 11), (20, 22), (5, 5), (35, 36), (0.5, 20)])
def test_the_additive_form_keeps_a_share_on_top(keep: float, kept: int) -> None:
    option = {"plus": True, "compat": True, "beta": 0.1}
    given = with_text()
    selection = vtprune.select("hiprune", keep=keep, signals=given, **option)
    assert selection.rows.shape == (1, kept)
    if kept < N:
        plain = vtprune.select("hiprune", keep=keep, signals=given, compat=True)
        assert set(plain.rows[0].tolist()) < set(selection.rows[0].tolist()) or kept == keep


def test_text_is_asked_for_in_words() -> None:
    with pytest.raises(InputError, match=r"signals\.text, per row \[M, D\]"):
        vtprune.select("hiprune", keep=20, signals=signals(at(1), at(2)), plus=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 must be a share"),
        ({"beta": float("nan")}, "beta=nan must be a share"),
        ({"layers": (1, 2, 3)}, "the middle block and the deep one"),
    ],
)
def test_values_out_of_range(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("hiprune", **option)


class Processor:
    class tokenizer:
        all_special_ids = (0, 1, 2)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_a_wrapped_model_only_hides_tokens(plus: bool, compat: bool) -> None:
    strategy = build("hiprune", plus=plus, compat=compat, alpha=1.0, beta=0.5)
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, strategy, keep=10, processor=Processor) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert [image.kept for image in handle.report().images] == [
            15 if plus and compat else 10
        ] * 3
    if not plus:
        assert_masks_only(model, inputs, strategy, "keep", keep=10)
