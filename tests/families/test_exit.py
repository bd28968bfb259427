"""What gates read equals eager, and what leaves by them equals being hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of
from tests.families.test_signals import FAMILIES, close, placeholders
from tests.families.test_signals_each import entering
from tests.gates import random_gates
from vtprune.engine import states
from vtprune.engine.plan import find_adapter
from vtprune.registry import build
from vtprune.types import Facts, Signals, Site, Stage, Strategy, TextState

KIND = "ragged"


@dataclass(frozen=True)
class Reading(Strategy):
    """Notes the states that enter two layers."""

    at: int
    seen: list[Signals] = field(default_factory=list, hash=False)
    acts_inside: ClassVar[bool] = True

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.DECODER, (TextState(self.at - 1), TextState(self.at)), self.at),)

    def score(self, signals: Signals) -> Tensor:
        self.seen.append(signals)
        return signals.tokens.norm(dim=-1)


def check(family: str, attention: str = "sdpa") -> None:
    """Holds what is read against the eager copy's hidden states."""
    model, visual = model_of(family, attention)[0], placeholders(family, KIND)
    valid = inputs_of(family, KIND)["attention_mask"].bool()
    strategy = Reading(find_adapter(model).facts.decoder_layers - 1)
    with vtprune.wrap(model, strategy, keep=0.4):
        model(**inputs_of(family, KIND))
    assert strategy.seen
    for signals in strategy.seen:
        assert signals.item is not None and signals.inside is not None
        for row, b in enumerate(signals.item.tolist()):
            last = int(visual[b].nonzero()[-1])
            for need, value in signals.values.items():
                words = entering(family, need.layer)[0][b, last + 1 :][valid[b, last + 1 :]]
                wanted = torch.cat([words[:-1].sum(0) / (len(words) - 1), words[-1]])
                size = wanted.abs().max()
                assert close(value[row] / size, wanted / size), need
                assert torch.equal(signals.inside.after[row][need], value[row])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_gates_read_equals_eager(family, attention):
    check(family, attention)


def test_a_wrong_reading_is_noticed(monkeypatch):
    right = states.STATES[TextState]

    def wrong(model, hidden, *args):
        return right(model, hidden.roll(1, 1), *args)

    monkeypatch.setitem(states.STATES, TextState, wrong)
    with pytest.raises(AssertionError):
        check("llava")


@pytest.mark.parametrize(
    ("image", "wanted"),
    [((1, 2), [6, 7, 8, 9]), ((2, 3), [8, 9, 8, 9]), ((3, 4), [8, 9, 8, 9])],
    ids=["two words after", "one", "none"],
)
def test_few_words_after_the_image(image, wanted):
    hidden = torch.arange(10.0).reshape(1, 5, 2)
    valid = torch.tensor([[False, True, True, True, True]])
    visual = torch.zeros(1, 5, dtype=torch.bool)
    visual[:, list(image)] = True
    read = states.STATES[TextState](None, hidden, {}, valid, visual)
    assert read.tolist() == [wanted]


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_by_gates_equals_being_hidden(family, tmp_path):
    model = model_of(family)[0]
    facts, width = find_adapter(model).facts, entering(family, 0)[0].shape[2]
    path = random_gates(tmp_path, facts.decoder_layers, 2 * width, seed=1)
    wrap = {"strategy": "dyvte", "gates": str(path)}
    gather_is_mask(family, inputs_of(family, KIND), {**wrap, "keep": 0.6})
    wrap_at_0 = {**wrap, "threshold": 0.0, "keep": 1.0}
    report = gather_is_mask(family, inputs_of(family, KIND), wrap_at_0).report()
    assert any(stage.kept == 0 for stage in report.stages)
    keeps_all(family, KIND, **wrap)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_others_may_merge_what_gates_let_stay(threshold, positions, tmp_path):
    family = "llava"
    facts, width = find_adapter(model_of(family)[0]).facts, entering(family, 0)[0].shape[2]
    path = random_gates(tmp_path, facts.decoder_layers, 2 * width, seed=1)
    first = build("dyvte", gates=str(path), threshold=threshold, layers=(1,))
    then = build("sparsevlm", layers=(2, 3))
    wrap = {"strategy": [first, then], "keep": [1.0, 0.8], "positions": positions}
    report = gather_is_mask(family, inputs_of(family, KIND), wrap).report()
    assert {stage.layer for stage in report.stages} >= {1, 2}
