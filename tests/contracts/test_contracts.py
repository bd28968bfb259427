"""What every strategy of the registry promises, on a tower with and on one without CLS."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys

import pytest
import torch

import vtprune
from tests.contracts.bank import (
    BY_ITSELF,
    EVERY,
    NEEDS_MAPS,
    TOWERS,
    WIDTH,
    assert_valid,
    broken,
    cast,
    constant,
    make_signals,
    same,
    unweighted,
)
from vtprune.errors import UnsupportedError
from vtprune.registry import build, keeping_names, strategy_class, strategy_names
from vtprune.types import ClsRow, Facts, Need, Strategy, check_needs

ALL = strategy_names()
KEEPING = keeping_names()  # the others are in test_compute.py and test_exit.py
N = 36
BY_CROP = {"holov"}  # these share the budget among crops, so equal tokens stay far apart
BY_FRAME = {"dycoke", "quota", "stc", "vcast", "vidcom2"}  # these share it among frames
BY_PAIRS = {"vispruner"}  # of two alike one leaves by its rank, whatever its index
BY_SUM = {"ats"}  # even points of a sum take equal tokens at even distances
BY_TURNS = {"mctf"}  # as the next, and then the lowest of the other half for the first that is left
BY_PLACE = {"pitome", "tofu", "tome"}  # the lowest of one half leave for the first of the other


def refused(strategy: Strategy, facts: Facts) -> bool:
    """Whether the strategy says itself that it cannot work on this tower."""
    try:
        for stage in strategy.plan(facts):
            check_needs(stage.needs, facts, strategy.name)
    except UnsupportedError:
        return True
    return False


def towers(name: str) -> list[str]:
    """The towers that the strategy can serve, a ViT by itself where there is no other."""
    if name in NEEDS_MAPS:
        assert all(refused(build(name), facts) for facts in TOWERS.values())
        return [BY_ITSELF]
    return [t for t, facts in TOWERS.items() if not refused(build(name), facts)]


SERVED = [(s, t) for s in KEEPING for t in towers(s)]
EXACT = [(s, t) for s, t in SERVED if strategy_class(s).kind == "select"]
SCORED = [(s, t) for s, t in SERVED if strategy_class(s).score is not Strategy.score]

each = pytest.mark.parametrize(("name", "tower"), SERVED)
each_exact = pytest.mark.parametrize(("name", "tower"), EXACT)
each_scored = pytest.mark.parametrize(("name", "tower"), SCORED)
each_class = pytest.mark.parametrize("name", ALL)


def test_the_bank_is_not_empty_and_every_strategy_is_in_it() -> None:
    assert {name for name, _ in SERVED} == set(KEEPING) >= {"random", "strided"}
    assert SCORED
    assert EXACT


@each_class
def test_a_tower_without_the_signals_is_refused(name: str) -> None:
    strategy = build(name)
    bare = dataclasses.replace(TOWERS["with CLS"], signals=frozenset(), family="a bare tower")
    needs = [need for stage in strategy.plan(bare) for need in stage.needs]
    assert refused(strategy, bare) == bool(needs)
    if needs:
        with pytest.raises(UnsupportedError, match=f"{name} needs .*a bare tower gives only no"):
            check_needs(needs, bare, name)


def test_a_strategy_that_insists_on_cls_is_refused_where_there_is_none() -> None:
    class Insists(Strategy):
        def needs(self, facts: Facts) -> tuple[Need, ...]:
            return (ClsRow(facts.feature_block),)

    assert not refused(Insists(), TOWERS["with CLS"])
    assert refused(Insists(), TOWERS["without CLS"])


@each_class
def test_the_file_names_its_paper_and_the_class_its_fields(name: str) -> None:
    cls = strategy_class(name)
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}|\bbaseline\b|\bown reading\b", text)
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # the one that dataclass makes up
    for option in set(cls.options()) - set(Strategy.options()):
        assert f"``{option}``" in cls.__doc__


@each_class
def test_a_strategy_is_a_comparable_value(name: str) -> None:
    strategy = build(name)
    assert strategy == build(name) == copy.deepcopy(strategy)
    assert hash(strategy) == hash(build(name))
    assert strategy.name == name
    for option in strategy.options():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(strategy, option, None)


@each_exact
@pytest.mark.parametrize("k", [1, 2, 5, 9, 18, N - 1])
def test_exactly_k_distinct_tokens_are_kept(name: str, tower: str, k: int) -> None:
    facts = EVERY[tower]
    signals = make_signals(build(name), facts, 3, N)
    assert_valid(build(name).select(signals, k), 3, N, k, facts)


@each_exact
@pytest.mark.parametrize("n", [2, 3, 7, 64, 123])
def test_any_number_of_tokens(name: str, tower: str, n: int) -> None:
    facts = EVERY[tower]
    signals = make_signals(build(name), facts, 2, n)
    for k in {1, n // 3 or 1, n - 1}:
        selection = vtprune.select(build(name), keep=k, signals=signals)
        assert_valid(selection, 2, n, k, facts)


@each
def test_outputs_are_finite_and_of_the_dtype_of_the_tokens(name: str, tower: str) -> None:
    facts = EVERY[tower]
    signals = make_signals(build(name), facts, 2, N)
    selection = vtprune.select(build(name), keep=0.25, signals=signals)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        source = torch.cat([signals.tokens, torch.ones(2, int(facts.has_cls), WIDTH)], dim=1)
        out = selection.apply(source.to(dtype))
        assert out.shape == (*selection.rows.shape, WIDTH)
        assert out.dtype == dtype
        assert out.isfinite().all()


@each
def test_all_tokens_and_a_single_one_stay_as_they_are(name: str, tower: str) -> None:
    for n, keep in [(N, N), (N, 1.0), (1, 1), (1, 0.1)]:
        signals = make_signals(build(name), EVERY[tower], 2, n)
        selection = vtprune.select(name, keep=keep, signals=signals)
        assert selection.is_identity
        assert torch.equal(selection.apply(signals.tokens), signals.tokens)


@each
def test_a_second_call_decides_the_same_whatever_came_between(name: str, tower: str) -> None:
    strategy = build(name)
    signals = make_signals(strategy, EVERY[tower], 3, N)
    before = cast(signals, torch.float32)
    first = vtprune.select(strategy, keep=9, signals=signals)
    vtprune.select(strategy, keep=20, signals=make_signals(strategy, EVERY[tower], 1, 25, seed=7))
    assert same(vtprune.select(strategy, keep=9, signals=signals), first)
    assert same(vtprune.select(build(name), keep=9, signals=before), first)
    assert strategy == build(name)


@each
def test_the_global_random_state_is_neither_read_nor_moved(name: str, tower: str) -> None:
    signals = make_signals(build(name), EVERY[tower], 2, N)
    torch.manual_seed(1)
    first = vtprune.select(name, keep=9, signals=signals)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(2)
    assert same(vtprune.select(name, keep=9, signals=signals), first)


@each
def test_the_signals_are_left_as_they_were(name: str, tower: str) -> None:
    signals = make_signals(build(name), EVERY[tower], 2, N)
    kept = copy.deepcopy(signals)
    vtprune.select(name, keep=9, signals=signals)
    assert torch.equal(signals.tokens, kept.tokens)
    assert all(torch.equal(v, kept.values[need]) for need, v in signals.values.items())


@each
@pytest.mark.parametrize("seed", range(3))
def test_an_image_is_decided_alone(name: str, tower: str, seed: int) -> None:
    strategy = build(name)
    signals = make_signals(strategy, EVERY[tower], 4, N, seed)
    together = vtprune.select(strategy, keep=9, signals=signals)
    turned = vtprune.select(strategy, keep=9, signals=signals.rows(torch.tensor([3, 2, 1, 0])))
    for b in range(4):
        alone = vtprune.select(strategy, keep=9, signals=signals.rows(torch.tensor([b])))
        assert same(alone, together.row(b))
        assert same(alone, turned.row(3 - b))


@each_scored
def test_scores_of_an_image_do_not_depend_on_the_batch(name: str, tower: str) -> None:
    strategy = build(name)
    signals = make_signals(strategy, EVERY[tower], 4, N)
    together = strategy.score(signals)
    for b in range(4):
        alone = strategy.score(signals.rows(torch.tensor([b])))
        assert torch.allclose(alone[0], together[b], rtol=1e-6, atol=0)


@each_scored
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bit_signals_are_finite_float32(
    name: str, tower: str, dtype: torch.dtype
) -> None:
    strategy = build(name)
    signals = make_signals(strategy, EVERY[tower], 2, N)
    rounded = dataclasses.replace(signals, tokens=signals.tokens.to(dtype))
    scores = strategy.score(rounded)
    assert scores.shape == (2, N)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@each_exact
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_signals_are_decided_too(name: str, tower: str, dtype: torch.dtype) -> None:
    facts = EVERY[tower]
    signals = cast(make_signals(build(name), facts, 2, N), dtype)
    assert_valid(build(name).select(signals, 9), 2, N, 9, facts)


@each_scored
def test_the_highest_scores_are_kept_and_ties_go_to_the_lower_index(name: str, tower: str) -> None:
    strategy = build(name)
    signals = make_signals(strategy, EVERY[tower], 2, N)
    half = {need: (v * 40).round() / 40 for need, v in signals.values.items()}  # few distinct
    signals = dataclasses.replace(signals, values=half)
    rows = strategy.select(signals, 9).rows.tolist()
    for scores, kept in zip(strategy.score(signals).tolist(), rows, strict=True):
        assert sorted(sorted(range(N), key=lambda i: (-scores[i], i))[:9]) == kept


@each
def test_equal_tokens_are_kept_from_the_lowest_index_on(name: str, tower: str) -> None:
    strategy, facts = build(name), EVERY[tower]
    drawn = [make_signals(strategy, facts, 2, N, seed) for seed in range(3)]
    decided = [vtprune.select(strategy, keep=9, signals=signals) for signals in drawn]
    equal = [vtprune.select(strategy, keep=9, signals=constant(signals)) for signals in drawn]
    assert all(same(unweighted(other), unweighted(equal[0])) for other in equal[1:])
    if all(torch.equal(other.rows, decided[0].rows) for other in decided[1:]):
        assert torch.equal(equal[0].rows, decided[0].rows)  # it looks at nothing: no ties
    elif name in BY_PAIRS:
        assert 0 in equal[0].rows[0]
    elif name in BY_SUM:
        assert (equal[0].rows.diff() >= N // 9).all()
    elif name in BY_TURNS:
        assert (equal[0].rows.diff() > 0).all()
        assert equal[0].total(torch.ones(2, N)).sum(1).tolist() == [N, N]
    elif name in BY_PLACE:
        assert (equal[0].rows.diff() > 0).all()
        assert equal[0].total(torch.ones(2, N)).tolist() == [[N - 8.0] + [1.0] * 8] * 2
    elif name in BY_FRAME:
        frames = equal[0].rows // (N // 3)
        assert all(len(set(row)) > 1 for row in frames.tolist()) or name == "dycoke"
        assert (equal[0].rows % (N // 3)).tolist() == _from_the_lowest(frames)
    elif name in BY_CROP:
        assert (equal[0].rows.diff() > 1).all()
    elif equal[0].mix is None:
        assert equal[0].rows.tolist() == [list(range(equal[0].rows.shape[1]))] * 2
    else:
        assert (equal[0].rows.masked_fill(equal[0].rows < 0, N).amin(1) == 0).all()


def _from_the_lowest(frames: torch.Tensor) -> list[list[int]]:
    """Places in their frames, each frame's from 0 on."""
    return [[row[:i].count(frame) for i, frame in enumerate(row)] for row in frames.tolist()]


@each_exact
def test_nan_breaks_neither_the_count_nor_other_images(name: str, tower: str) -> None:
    strategy, facts = build(name), EVERY[tower]
    signals = make_signals(strategy, facts, 3, N)
    clean = vtprune.select(strategy, keep=9, signals=signals)
    for tokens in ([0], [4, 17, N - 1], list(range(N))):
        selection = vtprune.select(strategy, keep=9, signals=broken(signals, [1], tokens))
        assert_valid(selection, 3, N, 9, facts)
        assert same(selection.row(0), clean.row(0))
        assert same(selection.row(2), clean.row(2))


@each_exact
def test_tokens_with_nan_are_not_preferred(name: str, tower: str) -> None:
    strategy, facts = build(name), EVERY[tower]
    signals = make_signals(strategy, facts, 2, N)
    clean = vtprune.select(strategy, keep=9, signals=signals)
    dropped = [i for i in range(N) if not (clean.rows == i).any()][:3]
    spoilt = vtprune.select(strategy, keep=9, signals=broken(signals, [0, 1], dropped))
    if spoilt.mix is None:  # a merged output may still be placed at any token
        assert not torch.isin(spoilt.rows, torch.tensor(dropped)).any()
