"""Which tokens compete for a budget: what a strategy sees, and on whom its decision depends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests.families.eager import mapping, patches
from tests.families.oracles import gather_is_mask, inputs_of, model_of
from tests.families.scoped import call, kept_of, tiles_of
from tests.families.test_scopes import CASES, SCOPES
from tests.probes import Spy
from vtprune.engine import items
from vtprune.engine.scopes import decide_in_scope
from vtprune.engine.signals import Images, Step
from vtprune.errors import UnsupportedError
from vtprune.types import (
    Budget,
    ClsRow,
    InstructionText,
    Mix,
    Received,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)

FRAMES = ["video_llava", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl"]


@dataclass(frozen=True)
class First(Strategy):
    """Keeps the first tokens that it sees."""

    scope: ClassVar[Scope] = "tile"

    def score(self, signals: Signals) -> Tensor:
        return -torch.arange(signals.n).float().expand(len(signals.tokens), -1)


@dataclass(frozen=True)
class Pairs(Strategy):
    """Keeps the first tokens, the very first as its sum with the ``far``-th."""

    far: int = -1

    def select(self, signals: Signals, k: int) -> Selection:
        b, n = signals.tokens.shape[:2]
        rows = torch.arange(k).expand(b, k)
        source = torch.cat([rows, torch.full((b, 1), self.far % n)], dim=1)
        target = torch.cat([rows, torch.zeros(b, 1, dtype=torch.long)], dim=1)
        return Selection(rows, n, Mix(source, target, torch.ones(source.shape)))


@dataclass(frozen=True)
class Neighbours(Strategy):
    """Adds each odd token to the one before; the second of these is a new one."""

    def select(self, signals: Signals, k: int) -> Selection:
        even = 2 * torch.arange(k)[None]
        rows = torch.where(even == 2, -1, even)
        place = torch.arange(k)[None]
        mix = Mix(
            torch.cat([even, even + 1], dim=1),
            torch.cat([place, place], dim=1),
            torch.cat([torch.ones(1, k), torch.full((1, k), 0.5)], dim=1),
        )
        return Selection(rows, signals.n, mix)


@dataclass(frozen=True)
class Reads(Spy):
    """Watches from after a strategy that works inside the tower."""

    scope: ClassVar[Scope] = "tile"
    seen: list[Signals] = field(default_factory=list)


def test_more_tiles_than_tokens_compete_as_one():
    (kept,) = kept_of(call("llava_next", "one", First(), 4))
    assert kept.tolist() == [0, 1, 2, 3]
    (kept,) = kept_of(call("llava_next", "one", First(), 5))
    assert tiles_of("llava_next", "one")[0][kept].sort().values.tolist() == [0, 1, 2, 3, 4]


# -- what a strategy sees ------------------------------------------------------------------------


def rows_of(seen: Sequence[Signals]) -> list[tuple[int, Any, Tensor]]:
    """Returns owner, grid and tokens of each row."""
    return [
        (int(signals.item[row]), signals.grid, signals.tokens[row])
        for signals in seen
        if signals.item is not None
        for row in range(len(signals.tokens))
    ]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_row_is_a_tile(family, kind):
    spy = Spy()
    handle = call(family, kind, spy, 0.5, scope="tile")
    rows = rows_of(spy.seen)
    for i, (item, tiles) in enumerate(zip(handle._items, tiles_of(family, kind), strict=True)):
        mixed = bool((tiles == -2).any())
        parts = [tiles != -1] if mixed else [tiles == t for t in tiles[tiles >= 0].unique()]
        mine = [tokens for owner, _, tokens in rows if owner == i]
        assert len(mine) == len(parts)
        for part in parts:
            assert any(torch.equal(tokens, item.tokens[part]) for tokens in mine)


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_the_grid_of_a_cropped_tile(family):
    spy = Spy()
    call(family, "one", spy, 0.5, scope="tile")
    # The image fills 56 x 42 of the 2 x 2 tiles' pixels: each has 3 of its 4 rows.
    assert [grid for _, grid, _ in rows_of(spy.seen)] == [(1, 4, 4)] + [(1, 3, 4)] * 4


@pytest.mark.parametrize("family", FRAMES)
def test_the_grid_of_a_frame(family):
    whole, spy = Spy(), Spy()
    call(family, "video", whole, 0.5, scope="image")
    call(family, "video", spy, 0.5, scope="tile")
    ((owner, grid, _),) = rows_of(whole.seen)
    assert grid is not None and grid[0] > 1
    assert [row[:2] for row in rows_of(spy.seen)] == [(owner, (1, *grid[1:]))] * grid[0]


def test_a_token_of_several_tiles_keeps_its_image_whole():
    (tiles,) = tiles_of("llava_onevision", "one")
    assert bool((tiles == -2).any())  # 3 x 4 tiles, shrunk
    spy = Spy()
    (item,) = call("llava_onevision", "one", spy, 0.5, scope="tile")._items
    ((_, grid, tokens),) = rows_of(spy.seen)
    assert grid is None and torch.equal(tokens, item.tokens[item.free])


def test_a_row_is_a_sample():
    spy = Spy(wanted=(InstructionText(),))
    handle = call("llava_next_video", "video_and_image", spy, 0.5, scope="sample")
    ((owner, grid, tokens),) = rows_of(spy.seen)
    assert (owner, grid) == (0, None)
    assert torch.equal(tokens, torch.cat([item.tokens[item.free] for item in handle._items]))
    text = spy.seen[0].text
    assert text is not None and len(text) == 1 and len(text[0])


def test_signals_and_survivors_keep_their_tile():
    needs = (ClsRow(2), Received(1))
    alone, after = Spy(wanted=needs), Spy(wanted=needs)
    call("llava_next", "one", alone, 0.5, scope="tile")
    steps = ["strided", after]
    handle = call("llava_next", "one", steps, [40, 0.5], scope="tile")
    assert sorted(signals.n for signals in after.seen for _ in signals.tokens) == [7, 7, 8, 8, 10]
    whole = {tuple(x.tolist()): i for i, x in enumerate(handle._items[0].tokens)}
    (tiles,) = tiles_of("llava_next", "one")
    values = patches("llava_next", "one", "image")
    weights = mapping("llava_next", "one", "image")
    for signals in after.seen:
        for row, tokens in enumerate(signals.tokens):
            own = [whole[tuple(x.tolist())] for x in tokens]
            assert len(tiles[own].unique()) == 1
            for need in needs:
                wanted = weights[own] @ values[need]
                torch.testing.assert_close(signals.values[need][row], wanted)


def test_what_the_tower_left_keeps_its_tile():
    spy = Reads()
    call("llava_next", "one", ["vispruner", spy], [30, 0.5])
    assert sorted(signals.n for signals in spy.seen for _ in signals.tokens) == [5, 6, 6, 6, 7]


# -- whom a decision depends on ------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fastervlm", "hiprune", "divprune"])
def test_a_tile_is_decided_alone(strategy):
    model = model_of("llava_next")[0]
    inputs = dict(inputs_of("llava_next", "one"))
    (tiles,) = tiles_of("llava_next", "one")

    def decided(scope: Scope) -> list[list[int]]:
        with vtprune.wrap(model, strategy, keep=20, scope=scope) as handle, torch.no_grad():
            model(**inputs)
        (kept,) = kept_of(handle)
        return [kept[tiles[kept] == tile].tolist() for tile in range(5)]

    before, together = decided("tile"), decided("image")
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    seeded = torch.Generator().manual_seed(3)
    changed = inputs["pixel_values"][0, 2]
    changed.copy_(2 * torch.randn(changed.shape, generator=seeded))
    after = decided("tile")
    assert [before[t] for t in (0, 1, 3, 4)] == [after[t] for t in (0, 1, 3, 4)]
    assert before[2] != after[2]
    assert [len(x) for x in before] == [5, 4, 4, 4, 3]
    assert [len(x) for x in together] != [len(x) for x in before]


def test_an_image_may_leave_a_tile_nothing_and_a_sample_an_image():
    (tiles,) = tiles_of("llava_next", "one")
    (kept,) = kept_of(call("llava_next", "one", First(), 16, scope="image"))
    assert tiles[kept].tolist() == [0] * 16
    (kept,) = kept_of(call("llava_next", "one", First(), 16))
    assert tiles[kept].unique().tolist() == [0, 1, 2, 3, 4]
    handle = call("llava", "ragged", First(), 8, scope="sample")
    assert [image.kept for image in handle.report().images] == [8, 16, 0]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "gemma3"])
def test_an_image_of_which_nothing_stays(family):
    wrap = {"strategy": First(), "keep": 4, "scope": "sample"}
    handle = gather_is_mask(family, inputs_of(family, "ragged"), wrap)
    assert min(image.kept for image in handle.report().images) == 0


def test_steps_after_one_that_left_an_image_nothing():
    steps = [First(), "divprune"]
    handle = call("llava", "ragged", steps, [8, 0.5], scope="sample")
    assert [image.kept for image in handle.report().images] == [4, 8, 0]
    handle = call("llava", "ragged", [First(), "fastervlm"], [8, 3], scope="sample")
    assert [image.kept for image in handle.report().images] == [3, 3, 0]


def test_what_is_made_in_an_image_is_made_of_its_tokens():
    tokens = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0))
    whole = [Selection.all(1, n, tokens.device) for n in (10, 6)]
    images = Images(list(tokens[0].split([10, 6])), [None] * 2, {}, None, whole)
    step = Step(Neighbours(), Stage(Site.PROJECTOR), Budget(fraction=0.5), "renumber", "sample")
    chosen = decide_in_scope(step, images, [3, 3])
    made = [s.apply(x[None])[0] for s, x in zip(chosen, images.tokens, strict=True)]
    assert [len(x) for x in made] == [5, 3]
    wanted = Neighbours().select(Signals(tokens), 8)
    assert torch.equal(torch.cat(made), wanted.apply(tokens)[0])
    slots = torch.cat([chosen[0].slots[0], chosen[1].slots[0] + 10])
    assert torch.equal(slots, wanted.slots[0])
    assert [s.n for s in chosen] == [10, 6]


def test_the_words_are_those_of_the_sample():
    texts: dict[Scope, dict[int, Tensor]] = {}
    for scope in SCOPES:
        spy = Spy(wanted=(InstructionText(),))
        call("llava_next", "ragged", spy, 0.5, scope=scope)
        texts[scope] = {}
        for signals in spy.seen:
            assert signals.item is not None and signals.text is not None
            texts[scope] |= dict(zip(signals.item.tolist(), signals.text, strict=True))
    first, second, third = (texts["tile"][owner] for owner in range(3))
    assert first.shape != second.shape or not torch.equal(first, second)
    assert torch.equal(second, third)
    for owner, text in enumerate((first, second, third)):
        assert torch.equal(texts["image"][owner], text)
    for owner, text in enumerate((first, second)):
        assert torch.equal(texts["sample"][owner], text)


def test_tokens_of_several_images_are_not_merged():
    with pytest.raises(UnsupportedError, match=r"scope='sample': .*tokens of several images"):
        call("llava", "ragged", Pairs(), 8, scope="sample")
    wrap = {"strategy": Pairs(far=9), "keep": 8, "scope": "sample"}
    gather_is_mask("llava", inputs_of("llava", "ragged"), wrap)


def test_rows_of_some_know_those_of_all():
    x = torch.arange(4.0).view(2, 2, 1)
    every = [Signals(x[:1], item=torch.tensor([0])), Signals(x[1:], item=torch.tensor([0]))]
    signals = Signals(x, item=torch.tensor([0, 0]), groups=every)
    assert signals.rows(torch.tensor([1])).groups is every


def test_tiles_mixed_up_are_noticed(monkeypatch):
    right = items._tiles

    def rolled(carried: Tensor) -> Tensor | None:
        return right(carried.roll(1, 0))

    monkeypatch.setattr(items, "_tiles", rolled)
    with pytest.raises(AssertionError):
        test_a_row_is_a_tile("llava_next", "one")
