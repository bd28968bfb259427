"""Which scopes may be asked for, and which ones strategies have by their authors."""

from __future__ import annotations

from typing import Any, cast

import pytest

import vtprune
from tests import tiny
from tests.contracts.bank import TOWERS
from tests.families.oracles import model_of
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.registry import build, strategy_names
from vtprune.types import Site


@pytest.mark.parametrize("name", strategy_names())
def test_the_authors_scope_fits_the_site(name):
    strategy = build(name)
    for facts in TOWERS.values():
        sites = {stage.site for stage in strategy.plan(facts)}
        if Site.ENCODER in sites:
            assert strategy.scope == "tile"
        elif Site.DECODER in sites and Site.PROJECTOR not in sites:
            assert strategy.scope == "sample"


def test_an_unknown_scope():
    allowed = r"scope='frame' is unknown; choose one of 'tile', 'image', 'sample'\."
    with pytest.raises(ConfigError, match=allowed):
        vtprune.wrap(tiny.build(), "divprune", keep=9, scope=cast(Any, "frame"))


@pytest.mark.parametrize(
    ("family", "strategy", "scope", "message"),
    [
        ("llava_next", "visionzip", "image", "visionzip decides tile by tile, inside the"),
        ("llava_next", "flowcut", "sample", "flowcut decides tile by tile"),
        ("llava", "visionzip", "sample", "visionzip decides tile by tile"),
        ("llava", "fastv", "image", "fastv decides on a whole sample"),
        ("qwen2_vl", ["divprune", "dart"], "tile", "dart decides on a whole sample"),
    ],
)
def test_the_place_of_a_stage_says_what_competes(family, strategy, scope, message):
    keep = [0.5, 0.5] if isinstance(strategy, list) else 0.5
    with pytest.raises(UnsupportedError, match=f"scope='{scope}': {message}.*Leave scope out"):
        vtprune.wrap(model_of(family)[0], strategy, keep=keep, scope=scope)


@pytest.mark.parametrize(
    ("strategy", "scope"), [("visionzip", "image"), ("visionzip", "tile"), ("fastv", "sample")]
)
def test_what_the_place_says_anyway_may_be_said(strategy, scope):
    model = model_of("llava")[0]  # here an image is one tile
    vtprune.wrap(model, strategy, keep=0.5, scope=scope).remove()
