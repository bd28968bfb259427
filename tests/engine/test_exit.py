"""All visual tokens of a sample leave inside the language model: none, some or all samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_inside import assert_hides_only
from tests.families.oracles import gather_is_mask, inputs_of
from tests.probes import generate
from vtprune.errors import InputError
from vtprune.strategies.fastv import FastV
from vtprune.strategies.todre import ToDRE, attended
from vtprune.types import (
    Budget,
    Facts,
    Inside,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    TextRows,
)

ROWS = {"none": [], "the first": [0], "the second": [1], "all": [0, 1]}


@dataclass(frozen=True)
class Leave(Strategy):
    """Lets all tokens of some samples leave before a layer."""

    samples: tuple[int, ...] = ()
    at: int = 2
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.DECODER, (TextRows(self.at),), self.at),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        assert signals.item is not None
        return [0 if i in self.samples else signals.n for i in signals.item.tolist()]

    def score(self, signals: Signals) -> Tensor:
        raise AssertionError("there is nothing to choose")


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["the first", "the second", "all"])
def test_leaving_equals_being_hidden(rows, attention, policy, options):
    model, inputs = tiny.build(attention=attention), tiny.ragged()
    visual = (inputs["input_ids"] == tiny.IMAGE).sum(1).tolist()
    strategy = Leave(tuple(ROWS[rows]))
    if rows == "all":
        report = assert_hides_only(model, inputs, strategy, policy, 1.0, **options)
        assert report.of_sample(0) == (tiny.N, tiny.N / 2)
        return
    with vtprune.wrap(model, strategy, keep=1.0, positions=policy) as handle:
        ids, logits = generate(model, inputs, **options)
        report = handle.report()
    left = {stage.sample: stage.kept for stage in report.stages}
    assert left == {row: 0 if row in ROWS[rows] else visual[row] for row in (0, 1)}
    # A row decides alone: both as if all left, and as if none did.
    for leaving in (ROWS[rows], [row for row in (0, 1) if row not in ROWS[rows]]):
        samples = (0, 1) if leaving == ROWS[rows] else ()
        with vtprune.wrap(model, Leave(samples), keep=1.0, positions=policy):
            wanted, all_logits = generate(model, inputs, **options)
        assert torch.equal(ids[leaving], wanted[leaving])
        assert (logits - all_logits)[leaving].abs().max() < 1e-4


def test_none_leave_is_bit_identical():
    model, inputs = tiny.build(), tiny.ragged()
    ids, logits = generate(model, inputs)
    with vtprune.wrap(model, Leave(), keep=1.0) as handle:
        same, same_logits = generate(model, inputs)
        assert all(stage.kept == stage.tokens for stage in handle.report().stages)
    assert torch.equal(ids, same) and torch.equal(logits, same_logits)


def test_a_later_stage_does_not_ask_for_samples_without_tokens():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, [Leave((0,), at=1), FastV(layers=(2,))], keep=[1.0, 9]) as handle:
        generate(model, inputs)
        stages = [(s.layer, s.sample, s.kept) for s in handle.report().stages]
    assert stages == [(1, 0, 0), (1, 1, 2 * tiny.N), (2, 1, 9)]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_leave_with_the_last_patch(family):
    inputs = inputs_of(family, "ragged")
    wrap = {"strategy": ToDRE(exit=True, tau=1.0), "keep": 0.4}
    handle = gather_is_mask(family, inputs, wrap)
    assert any(image.fixed for image in handle.report().images)
    assert [stage.kept for stage in handle.report().stages] == [0, 0]
    assert handle.final is not None
    left = (handle.final >= 0).sum(1)
    ids = inputs["input_ids"]
    words = inputs["attention_mask"].bool() & (ids != handle.adapter.modalities[0].placeholder)
    assert torch.equal(left, words.sum(1))


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_who_leaves_is_whom_the_text_attends_to_too_little(samples, tau):
    value = torch.rand(samples, 8, generator=torch.Generator().manual_seed(0)) / 8
    shares = value.sum(1).tolist()
    for limit in (tau, sum(shares) / samples):
        inside = Inside(0, (3,), 4, (8,) * samples, images=((8,),) * samples)
        signals = Signals(torch.zeros(samples, 8, 1), values={TextRows(3): value}, inside=inside)
        counts = ToDRE(exit=True, tau=limit).counts(signals, Budget.of(0.5))
        assert counts == [0 if share < limit else 8 for share in shares]
        assert attended(signals).tolist() == pytest.approx(shares)


@dataclass(frozen=True)
class Nothing(Strategy):
    """Keeps no token before the language model."""

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        return [0] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        raise AssertionError("there is nothing to choose")


def test_nowhere_else_all_may_leave():
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, Nothing(), keep=4),
        pytest.raises(InputError, match=r"leaves none of 36 tokens.*at least 1"),
    ):
        model(**inputs)


def test_beams_and_a_loop_by_hand_after_an_exit():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, Leave((0,)), keep=1.0):
        wanted, _ = generate(model, inputs, n=5)
        out, mask, ids = model(**inputs), inputs["attention_mask"], []
        for _ in range(5):
            ids.append(
                out.logits[:, -1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30).argmax(-1)
            )
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            out = model(
                input_ids=ids[-1][:, None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
        twice = model.generate(
            **inputs, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2
        )
    assert torch.equal(torch.stack(ids, 1), wanted)
    assert torch.equal(twice[:, -5:], wanted.repeat_interleave(2, dim=0))
