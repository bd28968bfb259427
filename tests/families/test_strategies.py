"""Every strategy held against the oracles, on towers with and without [CLS], tiles, and Qwen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest

from tests.clip import ClipTokenizer, clip
from tests.contracts.bank import NEEDS_FRAMES, NEEDS_MAPS
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of
from tests.families.prompts import VIDEOS
from vtprune import UnsupportedError
from vtprune.eval import tiny
from vtprune.registry import keeping_names

# Of these the default suite sees every strategy, of the other families the slow one.
QUICK = ("llava", "llava_siglip", "llava_next", "qwen2_5_vl")
CLIP = ("llava", "llava_next", "llava_next_video", "video_llava")
# What several stages share must leave something to each.
KEEP = {"pyramiddrop": 0.6, "sparsevlm": 0.6, "sparsevlm_plus": 0.6, "transprune": 0.6}


@cache
def text_encoder() -> Any:
    return clip(), ClipTokenizer()


Variant = tuple[str, dict[str, Any]]
VARIANTS: dict[str, Variant] = {name: (name, {}) for name in keeping_names()}
# Options that take another way through the code.
VARIANTS |= {
    "cdpruner by CLIP": ("cdpruner", {"text_encoder": text_encoder}),
    "damro compat": ("damro", {"compat": True}),
    "dart compat": ("dart", {"compat": True}),
    "dycoke compat": ("dycoke", {"compat": True}),
    "evit without fusing": ("evit", {"fuse": False}),
    "fastvid compat": ("fastvid", {"compat": True}),
    "flowcut compat": ("flowcut", {"compat": True}),
    "flowcut inside": ("flowcut", {"inside": True}),
    "flowcut outside": ("flowcut", {"inside": False}),
    "holitom compat": ("holitom", {"compat": True}),
    "holitom contextual": ("holitom", {"contextual": 0.5, "tau": 0.0}),
    "holitom inner": ("holitom", {"inner": 0.5}),
    "holov compat": ("holov", {"compat": True}),
    "hiprune plus": ("hiprune", {"plus": True}),
    "pitome by states": ("pitome", {"metric": "states", "prop_attn": True}),
    "prumerge adaptive": ("prumerge", {"adaptive": True}),
    "prunevid compat": ("prunevid", {"compat": True, "tau": 0.0}),
    "prumerge_plus adaptive": ("prumerge_plus", {"adaptive": True}),
    "quota by CLIP": ("quota", {"text_encoder": text_encoder}),
    "quota interpolate": ("quota", {"reducer": "interpolate"}),
    "sparsevlm without recycling": ("sparsevlm", {"recycle": False}),
    "todre exit": ("todre", {"exit": True, "tau": 1.0}),
    "todre max_min": ("todre", {"objective": "max_min"}),
    "tofu compat": ("tofu", {"compat": True}),
    "tome unweighted": ("tome", {"prop_attn": False}),
    "transprune without instruction": ("transprune", {"instruction": False}),
    "visiondrop mean": ("visiondrop", {"merge": "mean"}),
    "vscan outside": ("vscan", {"inside": False}),
    "vscan outside compat": ("vscan", {"inside": False, "compat": True}),
    "trim by CLIP": ("trim", {"text_encoder": text_encoder}),
}
FAMILIES = [
    pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
    for family in tiny.names()
]


def given(family: str, variant: str) -> dict[str, Any]:
    """What ``wrap`` is told beside ``keep``."""
    strategy, options = VARIANTS[variant]
    made = {name: value() if callable(value) else value for name, value in options.items()}
    return {"strategy": strategy, "processor": model_of(family)[1], **made}


@contextmanager
def refusal(family: str, variant: str) -> Iterator[None]:
    """Asserts the error for a combination that cannot be right, and that there is none for others.

    A tower that is no CLIP has no text tower of its own, and none gives whole attention maps.
    """
    said = None
    if "text_encoder" in VARIANTS[variant][1] and family not in CLIP:
        said = "goes with a CLIP tower of its own width"
    elif VARIANTS[variant][0] in NEEDS_FRAMES and family not in VIDEOS:
        said = "needs Frames"
    elif VARIANTS[variant][0] in NEEDS_MAPS:
        said = "needs Maps"
    with nullcontext() if said is None else pytest.raises(UnsupportedError, match=said):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gather_equals_mask(family, variant):
    wrap = {**given(family, variant), "keep": KEEP.get(VARIANTS[variant][0], 0.4)}
    with refusal(family, variant):
        report = gather_is_mask(family, inputs_of(family, kind_of(family, variant)), wrap).report()
        left = [image.kept < image.tokens for image in report.images]
        assert any(left) or any(stage.kept < stage.tokens for stage in report.stages)


def kind_of(family: str, variant: str) -> str:
    """The batch that gives a strategy something to do."""
    videos = VARIANTS[variant][0] in NEEDS_FRAMES and family in VIDEOS
    return "video_and_image" if videos else "ragged"


INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "todre exit", "transprune")
INSIDE += ("visiondrop", "vscan")


@pytest.mark.parametrize("variant", INSIDE)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_gather_equals_mask_with_a_static_cache(family, variant):
    wrap = {**given(family, variant), "keep": KEEP.get(VARIANTS[variant][0], 0.4)}
    inputs = inputs_of(family, "ragged")
    report = gather_is_mask(family, inputs, wrap, cache_implementation="static").report()
    assert any(stage.kept < stage.tokens for stage in report.stages)


# Where the count is the image's own, ``keep`` is at most that, and 1.0 may still drop some; an exit
# does not ask what was to be kept.
OWN = {"adaptive", "exit"}
WHOLE = [name for name, (_, options) in VARIANTS.items() if not OWN & options.keys()]


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_bit_identical(family, variant):
    with refusal(family, variant):
        keeps_all(family, kind_of(family, variant), **given(family, variant))
