"""Sinks leave before all others where attention says what stays."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests import tiny
from tests.contracts.bank import TOWERS, make_signals
from tests.engine.test_computing import turned
from tests.probes import generate
from vtprune.engine import excluding
from vtprune.engine.signals import select_group
from vtprune.errors import ConfigError, InputError
from vtprune.registry import build, strategy_names
from vtprune.scoring import sinks as sinks_of_tokens
from vtprune.types import Attended, FirstState, LastRow, Signals, Site

FACTS = TOWERS["with CLS"]


@pytest.fixture(autouse=True)
def hard_to_reach(monkeypatch):
    """In states as narrow as these many tokens are large in some dimension."""
    monkeypatch.setattr(sinks_of_tokens, "TAU", 60.0)


def attentive(name: str) -> bool:
    """Whether a strategy keeps what attention inside the language model goes to."""
    strategy = build(name)
    return strategy.kind in ("select", "adaptive") and any(
        isinstance(need, Attended)
        for stage in strategy.plan(FACTS)
        if stage.site is Site.DECODER and stage.lets_leave
        for need in stage.needs
    )


NAMES = [name for name in strategy_names() if attentive(name)]


def test_it_is_an_option_of_every_strategy_that_reads_attention_there():
    assert {"fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus"} <= set(NAMES)
    for name in NAMES:
        told = excluding.stages_of(build(name, exclude_sinks=True), FACTS)
        for stage in told:
            firsts = [need for need in stage.needs if isinstance(need, FirstState)]
            reads = any(isinstance(need, Attended) for need in stage.needs)
            assert [need.layer for need in firsts] == ([stage.layer] if reads else [])
    for name in ("divprune", "random", "hiprune"):
        with pytest.raises(ConfigError, match=f"exclude_sinks=True: {name} keeps nothing for the"):
            vtprune.wrap(tiny.build(), build(name, exclude_sinks=True), keep=9)
    with pytest.raises(ConfigError, match="exclude_sinks=True: sinks exit with all others"):
        vtprune.wrap(tiny.build(), build("todre", exit=True, exclude_sinks=True), keep=9)
    with pytest.raises(ConfigError, match="exclude_sinks=1 must be True or False"):
        vtprune.wrap(tiny.build(), build("fastv", exclude_sinks=1), keep=9)


def with_sinks(n: int, sinks: list[int]) -> Signals:
    """One row of tokens of which ``sinks`` are large where the first one of the prompt is."""
    signals = make_signals(build("fastv"), FACTS, 1, n)
    signals.tokens[0, sinks, 5] = 1e4
    first = torch.ones(1, signals.tokens.shape[2])
    first[0, 5] = 1e4
    signals.values = {**signals.values, FirstState(1): first}
    return signals


@pytest.mark.parametrize("k", [1, 3, 5, 6, 8])
def test_a_sink_stays_only_where_others_lack(k):
    sinks = [0, 4, 7]
    signals = with_sinks(9, sinks)
    chosen = vtprune.select("fastv", keep=k, signals=signals, exclude_sinks=True).rows[0].tolist()
    scores = signals.stack(LastRow)[-1, 0]
    order = sorted(range(9), key=lambda i: (i in sinks, 0 if i in sinks else -float(scores[i])))
    assert chosen == sorted(order[:k])


def test_without_sinks_nothing_changes_and_without_a_first_state_it_is_refused():
    signals = with_sinks(9, [])
    plain = vtprune.select("fastv", keep=4, signals=signals)
    told = vtprune.select("fastv", keep=4, signals=signals, exclude_sinks=True)
    assert torch.equal(plain.rows, told.rows)
    signals.values = {n: v for n, v in signals.values.items() if not isinstance(n, FirstState)}
    with pytest.raises(InputError, match="the signals hold no FirstState"):
        vtprune.select("fastv", keep=4, signals=signals, exclude_sinks=True)


def test_merging_makes_nothing_of_sinks():
    signals = make_signals(build("sparsevlm"), FACTS, 1, 12)
    signals.tokens[0, [2, 3], 5] = 1e4
    first = torch.zeros(1, signals.tokens.shape[2])
    first[0, 5] = 1e4
    signals.values = {**signals.values, FirstState(3): first}
    strategy = build("sparsevlm", exclude_sinks=True)
    selection = select_group(strategy, signals, 6)
    assert selection.mix is not None
    assert not {2, 3} & {*selection.rows[0].tolist(), *selection.mix.source[0].tolist()}
    assert selection.apply(signals.tokens).abs().max() < 1e3


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_in_a_model_without_sinks_nothing_changes(name):
    model, inputs = tiny.build(), tiny.ragged()
    options = {"keep": 0.6, "processor": tiny.Processor()}
    found = []
    for told in (False, True):
        with vtprune.wrap(model, build(name, exclude_sinks=told), **options):
            found.append(generate(model, inputs, 3)[1])
    assert torch.equal(*found)


def test_in_a_model_sinks_leave_first_row_by_row():
    """Made large before the layer, after the attention by which is chosen; row 1 is padded."""
    model, inputs = tiny.build(), turned()
    columns = (inputs["input_ids"][1] == tiny.IMAGE).nonzero()[:, 0]
    sinks, first = columns[::3], int(inputs["attention_mask"][1].argmax())

    def enlarge(module, args):
        if args[0].shape[1] > 1:
            hidden = args[0].clone()
            hidden[1, sinks, 7], hidden[1, first, 7] = 1e4, -1e4
            hidden[0, 20, 7] = 1e4  # large where the first token of its row is not: no sink
            return (hidden,)
        return None

    model.model.language_model.layers[1].register_forward_pre_hook(enlarge)
    kept = []
    for told in (False, True):
        with vtprune.wrap(model, build("fastv", layers=(1,), exclude_sinks=told), keep=15) as h:
            generate(model, inputs, 3)
            assert h.final is not None
            kept.append([set(row[row >= 0].tolist()) for row in h.final])
    (plain0, plain1), (told0, told1) = kept
    drawn = set(sinks.tolist())
    assert plain0 == told0
    assert plain1 & drawn
    assert not told1 & drawn
    assert len(told1) == len(plain1)
    assert plain1 - drawn < told1
