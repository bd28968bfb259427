"""Scopes in the families: the oracles, exact counts, the authors' ways with tiles and frames."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

import vtprune
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all
from tests.families.scoped import call, kept_of, per_tile, tiles_of
from tests.probes import Spy
from vtprune.engine import scopes
from vtprune.registry import build
from vtprune.scoring.guidance import guidance, unit_guidance, unit_range
from vtprune.types import Budget, ClsRow, InstructionText, Received, Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
# Tiles, frames of several families, two images in a sample, both kinds in one.
CASES = [
    ("llava_next", "one"),
    ("llava_next", "ragged"),
    ("llava", "ragged"),
    ("llava_onevision", "ragged"),
    ("video_llava", "video"),
    ("llava_next_video", "video_and_image"),
    ("qwen2_vl", "video_and_image"),
    ("qwen3_vl", "ragged"),
    ("internvl", "ragged"),
]


# -- the oracles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_keep_all_is_bit_identical(family, kind, scope):
    keeps_all(family, kind, "divprune", scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gather_equals_mask(family, kind, scope):
    wrap = {"strategy": "fastervlm", "keep": 0.4, "scope": scope}
    gather_is_mask(family, inputs_of(family, kind), wrap)


@pytest.mark.parametrize("scope", ["tile", "image"])
def test_merging_equals_the_merged_rows(scope):
    wrap = {"strategy": "visionzip", "keep": 0.4, "scope": scope}
    gather_is_mask("qwen2_vl", inputs_of("qwen2_vl", "video_and_image"), wrap)


# -- how many stay -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, 7, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_total_does_not_depend_on_the_scope(family, kind, keep):
    budget = Budget.of(keep)
    for scope in SCOPES:
        handle = call(family, kind, "divprune", keep, scope=scope)
        kept = [len(x) for x in kept_of(handle)]
        wanted = [budget.count(len(item.free)) for item in handle._items]
        samples = [image.sample for image in handle.report().images]
        if scope == "sample":
            for sample in set(samples):
                own = [i for i, of in enumerate(samples) if of == sample]
                assert sum(kept[i] for i in own) == sum(wanted[i] for i in own)
        else:
            assert kept == wanted


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_tile_keeps_its_share(family, kind):
    handle = call(family, kind, "divprune", 0.4, scope="tile")
    for tiles, kept in zip(tiles_of(family, kind), kept_of(handle), strict=True):
        if not bool((tiles == -2).any()):
            n = int((tiles >= 0).sum())
            for tile in tiles[tiles >= 0].unique():
                share = round(0.4 * n) * int((tiles == tile).sum()) / n
                assert abs(int((tiles[kept] == tile).sum()) - share) < 1


# -- the authors' ways ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "need"),
    [
        ("video_llava", ClsRow(2)),
        ("llava_next_video", ClsRow(2)),
        ("llava_onevision", Received(3)),
        ("qwen2_vl", Received(3)),
        ("qwen2_5_vl", Received(3)),
    ],
)
def test_fastervlm_keeps_as_many_of_each_frame(family, need):
    wanted = per_tile(family, "video", need, 2)
    (tiles,) = tiles_of(family, "video")
    keep = 2 * len(tiles[tiles >= 0].unique())
    handle = call(family, "video", "fastervlm", keep)
    assert [kept.tolist() for kept in kept_of(handle)] == wanted


def test_hiprune_divides_a_total_by_the_tiles():
    spy = Spy(wanted=(Received(1), Received(2)))
    call("llava_next", "one", spy, 0.5, scope="tile")
    handle = call("llava_next", "one", build("hiprune", alpha=1.0), 40)
    rows = [x.rows(torch.tensor([b])) for x in spy.seen for b in range(len(x.tokens))]
    counts = [10, 8, 8, 7, 7]  # of 16 tokens and four times 12
    (tiles,) = tiles_of("llava_next", "one")
    (kept,) = kept_of(handle)
    for tile, (signals, k) in enumerate(zip(rows, counts, strict=True)):
        spots = (tiles == tile).nonzero()[:, 0]
        wanted = vtprune.select("hiprune", keep=k, signals=signals, alpha=1.0).rows[0]
        assert kept[tiles[kept] == tile].tolist() == spots[wanted].tolist()


def test_cdpruner_weighs_by_the_range_of_the_image():
    whole, spy = Spy(wanted=(InstructionText(),)), Spy(wanted=(InstructionText(),))
    call("llava_next", "ragged", whole, 0.9, scope="image")
    call("llava_next", "ragged", spy, 0.9, scope="tile")
    wanted: dict[tuple[int, float], float] = {}
    for signals in whole.seen:
        assert signals.item is not None
        plain, weights = guidance(signals), unit_range(guidance(signals), None)
        for owner, x, w in zip(signals.item.tolist(), plain, weights, strict=True):
            wanted |= {(owner, round(float(a), 5)): float(b) for a, b in zip(x, w, strict=True)}
    seen = 0
    for signals in spy.seen:
        assert signals.item is not None
        rows = zip(signals.item.tolist(), guidance(signals), unit_guidance(signals), strict=True)
        for owner, x, w in rows:
            for a, b in zip(x, w, strict=True):
                assert float(b) == pytest.approx(wanted[owner, round(float(a), 5)], abs=1e-4)
                seen += 1
    assert seen == sum(signals.n * len(signals.tokens) for signals in whole.seen)


# -- faults that must be noticed -----------------------------------------------------------------


def test_parts_put_back_elsewhere_are_noticed(monkeypatch):
    right = scopes.join

    def turned(parts: Any, n: int) -> Any:
        where = [positions for _, positions in parts][::-1]
        chosen = [selection for selection, _ in parts]
        return right([(c, w[: c.n]) for c, w in zip(chosen, where, strict=True)], n)

    monkeypatch.setattr(scopes, "join", turned)
    with pytest.raises(AssertionError):
        test_fastervlm_keeps_as_many_of_each_frame("video_llava", ClsRow(2))


def test_a_share_of_each_tile_is_noticed(monkeypatch):
    monkeypatch.setattr(Budget, "split", lambda self, lengths: [self] * len(lengths))
    with pytest.raises(AssertionError):
        test_the_total_does_not_depend_on_the_scope("llava_next", "one", 0.2)
