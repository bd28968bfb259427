"""Rules that stand for attention: what they are shown, what follows tokens, what stages read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests.vits.models import DEPTH, NAMES, PATCHES, answer, assert_one_graph, build, images, wrap
from vtprune.attending import Attended, Attending, gathered
from vtprune.types import (
    Attention,
    AttentionRule,
    Budget,
    ClsRow,
    Facts,
    Left,
    Maps,
    Received,
    Signals,
    Site,
    Stage,
    Strategy,
    TotalReceived,
)


@dataclass(frozen=True)
class Plain(AttentionRule):
    """Attention as it is, which leaves with each token its place, and counts blocks."""

    seen: list[Attending] = field(default_factory=list, compare=False)
    turned: bool = False

    def attend(self, given: Attending) -> Attended:
        self.seen.append(given)
        map = given.logits().softmax(-1)
        batch, _, n, _ = given.q.shape
        places = given.tokens.get("place", torch.arange(n).expand(batch, n))
        rows = {"blocks": given.rows.get("blocks", torch.zeros(batch)) + 1}
        out = gathered(map, given.v)
        out = out.flip(-1) if self.turned else out
        return Attended(out, {"place": places}, rows, map, share=0.5)


class Weighed(Plain):
    """As ``Plain``; the mean over tokens counts each by its place."""

    pooled: ClassVar[str | None] = "place"


@dataclass(frozen=True)
class Ruled(Strategy):
    """Keeps the last patches, by what the rule left with each."""

    kept: ClassVar[int] = 20
    rule: AttentionRule = field(default_factory=Plain)
    shown: list[Signals] = field(default_factory=list, compare=False)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        kinds = (Received, TotalReceived, Maps, *([ClsRow] if facts.has_cls else []))
        return tuple(
            Stage(
                Site.ENCODER,
                (Attention(), Left(i, "place"), *(kind(i) for kind in kinds)),
                i,
                before_mlp=True,
                attend=self.rule,
            )
            for i in range(facts.vision_layers)
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        assert signals.inside is not None
        left = [PATCHES if budget.fraction == 1 else 40, 30, 20][signals.inside.stage]
        return [PATCHES if budget.fraction == 1 else left] * len(signals.tokens)

    def score(self, signals: Signals) -> Tensor:
        self.shown.append(signals)
        return signals.stack(Left)[-1].float()


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_attends_as_usual_changes_nothing(name: str) -> None:
    model, x = build(name), images()
    plain, rule = answer(model, x), Plain()
    with wrap(model, Ruled(rule=rule), keep=1.0) as handle:
        torch.testing.assert_close(answer(model, x), plain, rtol=1e-5, atol=1e-5)
        assert [given.layer for given in rule.seen] == list(range(DEPTH))
        assert {given.n_prefix for given in rule.seen} == {handle.adapter.n_prefix}
        assert handle._passage.entering[-1].rows["blocks"].tolist() == [DEPTH] * 2
    with wrap(model, Ruled(rule=Plain(turned=True)), keep=1.0):
        assert not torch.allclose(answer(model, x), plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("name", ["vit", "registers", "siglip_gap", "dinov3", "open_clip"])
def test_what_a_rule_leaves_follows_the_tokens(name: str) -> None:
    model, x = build(name), images()
    strategy = Ruled()
    with wrap(model, strategy, keep=0.5) as handle:
        answer(model, x)
        p = handle.adapter.n_prefix
        assert [s.n for s in strategy.shown] == [PATCHES, 40, 30]
        for state in handle._passage.entering[1:]:
            assert state.index is not None
            assert torch.equal(state.tokens["place"][:, p:], state.index + p)
            assert torch.equal(state.tokens["place"][:, :p], torch.arange(p).expand(2, p))
        expected = torch.arange(PATCHES - 20, PATCHES)
        assert all(torch.equal(s.rows[0], expected) for s in handle.selections)


def test_stages_read_the_map_of_the_rule() -> None:
    model, x = build("vit"), images()

    class Halved(Plain):
        def attend(self, given: Attending) -> Attended:
            made = super().attend(given)
            assert made.map is not None
            return Attended(made.out, made.tokens, made.rows, made.map * 0.5)

    plain, halved = Ruled(), Ruled(rule=Halved())
    for strategy in (plain, halved):
        with wrap(model, strategy, keep=0.5):
            answer(model, x)
    for ours, theirs in zip(halved.shown, plain.shown, strict=True):
        for kind in (ClsRow, Received, Maps):
            need = next(n for n in theirs.values if type(n) is kind)
            torch.testing.assert_close(ours.values[need], theirs.values[need] / 2)


@pytest.mark.parametrize("kind", [ClsRow, Received, TotalReceived, Maps])
def test_a_map_says_what_queries_and_keys_say(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("vit"), images()

    class Mapless(Plain):
        def attend(self, given: Attending) -> Attended:
            made = super().attend(given)
            return Attended(made.out, made.tokens, made.rows)

    shown = []
    for rule in (Plain(), Mapless()):
        strategy = Ruled(rule=rule)
        with wrap(model, strategy, keep=0.5):
            answer(model, x)
        shown.append(
            [next(v for n, v in s.values.items() if type(n) is kind) for s in strategy.shown]
        )
    for ours, theirs in zip(*shown, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_mean_counts_tokens_as_the_rule_says() -> None:
    model, x = build("siglip_gap"), images()
    with wrap(model, Ruled(rule=Weighed()), keep=1.0), torch.no_grad():
        pooled = model.pool(states := model.forward_features(x))
    weight = torch.arange(PATCHES)[None, :, None]
    torch.testing.assert_close(pooled, (states * weight).mean(1))


def test_reports_give_attention_that_counts_as_theory() -> None:
    model, x = build("vit"), images()
    with wrap(model, Ruled(), keep=1.0) as handle:
        answer(model, x)
        report = handle.report()
    shape, n = handle.adapter.shape, PATCHES + 1
    whole = shape.prefill([n] * DEPTH)
    assert report.tower().share == 1
    spared = DEPTH * n * n * shape.width  # half of q k^T and A v
    assert report.tower(theoretical=True).macs == pytest.approx(2 * (whole - spared))
    assert "tower in theory, if attention were computed only where it counts" in str(report)
    with wrap(model, "tome", reduce=4) as handle:
        answer(model, x)
        assert "in theory" not in str(handle.report())


@pytest.mark.slow
def test_a_rule_compiles_to_one_graph() -> None:
    model, x = build("vit"), images()

    class Silent(Plain):
        def attend(self, given: Attending) -> Attended:
            return Attended(gathered(given.logits().softmax(-1), given.v))

    class Last(Ruled):
        def plan(self, facts: Facts) -> tuple[Stage, ...]:
            rule, layers = Silent(), range(facts.vision_layers)
            needs = (Attention(),)
            return tuple(
                Stage(Site.ENCODER, needs, i, before_mlp=True, attend=rule) for i in layers
            )

        def score(self, signals: Signals) -> Tensor:
            return torch.arange(signals.n).float().expand(len(signals.tokens), -1)

    with wrap(model, Last(), keep=0.5):
        assert_one_graph(model, x)


def test_rules_are_of_vits_alone() -> None:
    from vtprune.eval import tiny

    model, _ = tiny.build("llava")
    with pytest.raises(vtprune.UnsupportedError, match="needs Attention"):
        vtprune.wrap(model, Ruled(), keep=0.5)


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "tokens stay behind": ("_follow", lambda rows, left, n: left[:, : rows.shape[1] + 1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_turn_the_oracle_red(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, replacement = FAULTS[fault]
    monkeypatch.setattr(f"vtprune.engine.vit_state.{name}", replacement)
    with pytest.raises(AssertionError):
        test_what_a_rule_leaves_follows_the_tokens("vit")
