"""Caches that entries left on every family: as by definition, head by head."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.engine.evicting_reference import ByDefinition, evicted
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of
from tests.families.test_computing import visual_of
from vtprune import UnsupportedError
from vtprune.engine import evicting, held
from vtprune.engine.decoding import Decoding
from vtprune.engine.places import places
from vtprune.engine.plan import find_adapter
from vtprune.eval import tiny
from vtprune.evicting import Entries, Kept
from vtprune.registry import build
from vtprune.scoring import evicting as scoring
from vtprune.strategies import lookm, snapkv
from vtprune.types import Budget

MAIN = ("llava", "qwen2_5_vl")
VARIANTS: dict[str, dict[str, Any]] = {
    "snapkv": {},
    "snapkv window": {"window": 3, "merge": "none", "side": 1},
    "lookm": {},
    "lookm pivot": {"merge": "pivot"},
    "lookm average": {"merge": "average", "recent": 0.3},
    "lookm weighted": {"merge": "weighted"},
    "lookm compat": {"compat": True},
}


def places_of(handle: vtprune.Handle, inputs: dict[str, Any]) -> Tensor | None:
    """Where the visual tokens are; None where those of an image form no grid."""
    with suppress(UnsupportedError):
        return places(inputs["input_ids"], handle._items)
    return None


def check(
    family: str, kind: str, variant: str, keep: Any, *first: str, **more: Any
) -> vtprune.Handle:
    model, inputs = model_of(family)[0], inputs_of(family, kind)
    strategy = build(variant.partition(" ")[0], **VARIANTS[variant], **more)
    chosen: Any = [*first, strategy] if first else strategy
    with vtprune.wrap(model, chosen, keep=keep) as handle:
        model(**inputs)
    eager = model_of(family, "eager")[0]
    budget = Budget.of(keep[-1] if isinstance(keep, list) else keep)
    stages = strategy.plan(find_adapter(model).facts)
    numbers = [stage.layer or 0 for stage in stages]
    visual = visual_of(model, inputs, inputs["input_ids"].shape[1])
    where, definition = places_of(handle, inputs), ByDefinition(strategy, budget)
    with evicted(find_adapter(eager).decoder, numbers, definition, visual, where):
        return gather_is_mask(family, inputs, {"strategy": chosen, "keep": keep}, steps=5)


QUICK = [("llava", "snapkv"), ("llava", "lookm pivot"), ("qwen2_5_vl", "snapkv")]
EACH = [(family, variant) for family in tiny.names() for variant in ("snapkv", "lookm pivot")]
EACH += [(family, variant) for family in ("llava", "qwen2_5_vl") for variant in VARIANTS]
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in dict.fromkeys(EACH)
]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_what_left_equals_what_is_hidden(family, variant):
    report = check(family, "ragged", variant, 0.5).report()
    assert report.prefill().share == 1
    assert {image.kept - image.tokens for image in report.images} == {0}
    assert all(held.kept < held.tokens for held in report.held)
    assert report.cache is not None
    assert report.cache.held < report.cache.unpruned


@pytest.mark.parametrize("name", ["snapkv", "lookm"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in MAIN else pytest.mark.slow) for f in tiny.names()]
)
def test_where_all_stays_it_is_the_unwrapped_model(family, name):
    keeps_all(family, "ragged", name)


@pytest.mark.parametrize("family", [pytest.param("llava", marks=pytest.mark.slow), "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("first", "keep"), [pytest.param("divprune", 0.5, marks=pytest.mark.slow), ("fastv", 0.4)]
)
def test_behind_a_strategy_that_drops(family, first, keep):
    for variant in ("snapkv", "lookm"):
        handle = check(family, "ragged", variant, [keep, 0.5], first)
        report = handle.report()
        assert all(held.kept == round(held.tokens / 2) for held in report.held)
        images = sum(image.tokens for image in report.images if image.sample == 0)
        assert max(held.tokens for held in report.held if held.sample == 0) <= images


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "video_and_image"])
def test_rows_without_images_and_videos_beside_images(kind):
    check("qwen2_5_vl", kind, "snapkv", 0.4)


# -- faults that must be noticed -------------------------------------------------------------------


def other_tokens(x: Tensor, places: Tensor) -> Tensor:
    return RIGHT["pick"](x, places[:, :1] if places.ndim == 3 else places)


def other_rows(decoding: Any, columns: Any, *more: Any) -> Any:
    found = list(RIGHT["_prompts"](decoding, columns, *more))
    return [(b, found[0][1], entries) for b, _, entries in found]


def other_heads(entries: Entries) -> Any:
    q = entries.q.unflatten(0, (-1, len(entries.k))).transpose(0, 1)
    return q, entries.k[:, None]


RIGHT: dict[str, Any] = {"pick": held.pick, "_prompts": evicting._prompts, "merged": scoring.merged}
FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "heads hold what the first one does": (held, "pick", other_tokens, "snapkv"),
    "tokens of another row": (evicting, "_prompts", other_rows, "snapkv"),
    "queries of other groups": (scoring, "_groups", other_heads, "snapkv"),
    "queries of other groups, all": (scoring, "_groups", other_heads, "lookm pivot"),
    "no neighbours": (snapkv, "pooled", lambda scores, *_: scores, "snapkv"),
    "another window": (snapkv, "question", lambda visual: visual.nonzero()[-1:, 0], "snapkv"),
    "nothing merged": (scoring, "merged", lambda e, stays, how: Kept(stays), "snapkv"),
    "values into text": (
        *(scoring, "merged"),
        lambda e, stays, how: RIGHT["merged"](replace(e, visual=e.visual | True), stays, how),
        "snapkv",
    ),
    "means for pivots": (
        *(scoring, "merged"),
        lambda e, stays, how: RIGHT["merged"](e, stays, "average"),
        "lookm pivot",
    ),
    "other sums": (
        *(lookm, "column_sums"),
        lambda e: scoring.column_sums(e) * 0 + torch.arange(e.n, 0, -1),
        "lookm pivot",
    ),
    "masks as of the prompt": (Decoding, "cached", Decoding.cut, "snapkv"),
    "merged keys and values are not written": (
        *(evicting.Leaving, "write"),
        lambda self, rows, spots, kept, *kv: RIGHT["write"](
            self, rows, spots, Kept(kept.stays), *kv
        ),
        "snapkv",
    ),
}
RIGHT["write"] = evicting.Leaving.write


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    where, name, wrong, variant = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check("llava", "ragged", variant, 0.5)
