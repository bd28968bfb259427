"""What strategies promise that shorten caches; what caches then hold is in engine/."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

import vtprune
from tests.contracts.bank import TOWERS, make_signals
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.evicting import Entries, Kept
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import Budget, Site

NAMES = [name for name in strategy_names() if strategy_class(name).kind == "cache"]
each = pytest.mark.parametrize("name", NAMES)
HEADS, SHARED, WIDTH = 6, 3, 8


def facts_of(depth: int):
    return dataclasses.replace(TOWERS["with CLS"], decoder_layers=depth)


def make(n_visual: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Entries:
    generator, n = torch.Generator().manual_seed(seed), n_visual + 9
    q, k, v = (
        torch.randn(heads, n, WIDTH, generator=generator).to(dtype)
        for heads in (HEADS, SHARED, SHARED)
    )
    visual = torch.zeros(n, dtype=torch.bool)
    visual[4 : 4 + n_visual] = True
    return Entries(q, k, v, visual)


def kept(name: str, entries: Entries, keep: int | float) -> Kept:
    made = build(name).evict(entries, Budget.of(keep))  # type: ignore[attr-defined]
    assert made is not None
    return made


def test_the_bank_is_not_empty() -> None:
    assert {"lookm", "snapkv"} <= set(NAMES)


@each
@pytest.mark.parametrize("depth", [1, 2, 12, 32])
def test_a_plan_is_an_eviction_in_each_of_some_layers(name: str, depth: int) -> None:
    stages = build(name).plan(facts_of(depth))
    assert [stage.layer for stage in stages] == list(range(depth))
    for stage in stages:
        assert stage.site is Site.DECODER
        assert stage.evict is not None
        assert not stage.needs
        assert not stage.lets_leave


@each
def test_layers_are_used_as_given(name: str) -> None:
    stages = build(name, layers=(7, 0)).plan(facts_of(12))
    assert [stage.layer for stage in stages] == [0, 7]
    for wrong in ((12,), (-1,), (3, 3), ()):
        with pytest.raises(ConfigError, match="decoder layers 0 to 11 to act in"):
            build(name, layers=wrong).plan(facts_of(12))


@each
def test_where_no_layer_is_known_it_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} acts inside the language model"):
        build(name).plan(facts_of(0))


@each
def test_it_chooses_no_tokens(name: str) -> None:
    signals = make_signals(build("random"), TOWERS["with CLS"], 2, 9)
    with pytest.raises(ConfigError, match=f"{name} chooses no tokens; give it to wrap"):
        vtprune.select(name, keep=3, signals=signals)


@each
@pytest.mark.parametrize(("n", "keep"), [(16, 1), (16, 5), (16, 15), (16, 0.5), (2, 1), (1000, 64)])
def test_each_head_keeps_exactly_so_many_and_all_text(name: str, n: int, keep: float) -> None:
    entries = make(n)
    stays = kept(name, entries, keep).stays
    assert stays.shape == (SHARED, entries.n)
    assert stays.dtype == torch.bool
    assert bool(stays[:, ~entries.visual].all())
    assert (stays & entries.visual).sum(1).tolist() == [Budget.of(keep).count(n)] * SHARED


@each
@pytest.mark.parametrize("keep", [16, 17, 1.0])
def test_where_all_stay_nothing_is_touched(name: str, keep: float) -> None:
    assert build(name).evict(make(), Budget.of(keep)) is None  # type: ignore[attr-defined]
    assert build(name).evict(make(1), Budget.of(1)) is None  # type: ignore[attr-defined]


@each
def test_heads_decide_by_themselves(name: str) -> None:
    """Whatever their order; and of two that differ the choices do."""
    entries = make()
    order = torch.tensor([2, 0, 1])
    turned = Entries(
        entries.q.unflatten(0, (SHARED, -1))[order].flatten(0, 1),
        entries.k[order],
        entries.v[order],
        entries.visual,
    )
    plain, other = kept(name, entries, 4), kept(name, turned, 4)
    assert torch.equal(plain.stays[order], other.stays)
    assert len({tuple(row) for row in plain.stays.tolist()}) > 1
    assert plain.v is not None
    assert other.v is not None
    assert torch.equal(plain.v[order], other.v)


@each
def test_it_decides_the_same_again(name: str) -> None:
    first, again = (kept(name, make(), 4) for _ in range(2))
    assert torch.equal(first.stays, again.stays)
    assert first.v is not None
    assert again.v is not None
    assert torch.equal(first.v, again.v)


@each
def test_ties_go_to_the_lower_index(name: str) -> None:
    """Queries of zeros attend to all alike, but for what tokens before see."""
    entries = make()
    entries = replace(entries, q=entries.q * 0, sees=lambda rows: torch.ones(len(rows), 25) > 0)
    stays = kept(f"{name}(recent=0.0)" if name == "lookm" else name, entries, 4).stays
    assert stays[:, 4:8].all()
    assert not stays[:, 8:20].any()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    made = kept(name, make(dtype=dtype), 4)
    assert made.v is not None
    assert made.v.dtype == dtype
    assert made.v[made.stays].isfinite().all()


@each
def test_tokens_keep_their_positions_and_samples_are_whole(name: str) -> None:
    strategy = build(name)
    assert (strategy.positions, strategy.scope, strategy.acts_inside) == ("keep", "sample", True)
