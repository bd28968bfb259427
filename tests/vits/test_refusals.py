"""What is refused on a ViT, and what the errors say; every strategy on one ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vtprune
from tests.vits.models import CONFIG, DEPTH, PATCHES, SMALL, answer, build, images
from vtprune.engine.vit_wrap import HOMES, REFUSED
from vtprune.registry import strategy_names, vit_adapter_classes

ConfigError, UnsupportedError = vtprune.ConfigError, vtprune.UnsupportedError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither given"),
        ({"keep": 8, "reduce": 8}, "both given"),
        ({"reduce": -1}, r"reduce=-1 is not understood. Give a whole number of at least 0"),
        ({"reduce": True}, "reduce=True"),
        ({"reduce": (8, 1.5)}, "inflection from -1 to 1"),
        ({"reduce": (8, float("nan"))}, "inflection from -1 to 1"),
        ({"reduce": [1] * (DEPTH + 1)}, f"a list of up to {DEPTH} numbers"),
        ({"reduce": [1, -1]}, "reduce="),
        ({"reduce": 1.0}, "above 0 and below 1"),
        ({"reduce": 0.999}, r"blocks \[0, 1, 2\] can save 0\.\d+ at most"),
        ({"keep": 0}, "keeps nothing"),
        ({"keep": [4, 4]}, "no lists"),
        ({"keep": 4, "layers": (7,)}, r"layers=\(7,\)"),
        ({"keep": 4, "positions": "keep"}, "positions: for vision-language|positions: CLIP"),
        ({"keep": 4, "processor": object()}, "processor"),
    ],
)
def test_what_a_vit_does_not_take(given: dict[str, Any], message: str) -> None:
    model: Any = build("CLIPVisionModel")
    with pytest.raises(ConfigError, match=message):
        vtprune.wrap(model, "tome", **given)
    assert "forward" not in vars(model.encoder.layers[0])


def test_more_tokens_than_an_image_has_are_refused_where_that_is_fixed() -> None:
    with pytest.raises(ConfigError, match=f"keep=65, but an image has {PATCHES} tokens"):
        vtprune.wrap(build("vit"), "tome", keep=65)
    timm = pytest.importorskip("timm")
    small = {**SMALL, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **small).eval()
    handle: Any = vtprune.wrap(model, "tome", keep=65)
    with pytest.raises(ConfigError, match="images of one fixed size"):
        vtprune.wrap(model, "tome", reduce=0.5)
    with handle:
        answer(model, images())
        assert handle.report().images[0].short


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_models_with_a_bias_by_place_are_refused(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedError, match=f"{type(model).__name__} cannot be wrapped: .*bias"):
        vtprune.wrap(model, "tome", reduce=8)


@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "hiera_tiny_224", "samvit_base_patch16", "resnet18"),
        *("pit_ti_224", "mvitv2_tiny"),
    ],
)
def test_other_models_of_timm_are_refused(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedError, match=rf"timm.{type(model).__name__} (cannot|is no ViT)"):
        vtprune.wrap(model, "tome", reduce=8)


def test_other_blocks_attentions_and_pools_are_refused() -> None:
    timm = pytest.importorskip("timm")
    vision_transformer: Any = timm.models.vision_transformer
    for block in ("ResPostBlock", "ParallelScalingBlock"):
        block_fn = getattr(vision_transformer, block)
        model = timm.create_model("vit_tiny_patch16_224", block_fn=block_fn, **SMALL)
        with pytest.raises(UnsupportedError, match=f"has a {block} in its blocks"):
            vtprune.wrap(model, "tome", reduce=8)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer="diff", **SMALL)
    with pytest.raises(UnsupportedError, match="has a DiffAttention"):
        vtprune.wrap(model, "tome", reduce=8)
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avgmax", **SMALL)
    with pytest.raises(UnsupportedError, match="pools by avgmax"):
        vtprune.wrap(model, "tome", reduce=8)


def test_models_of_transformers_that_are_not_known_are_refused() -> None:
    config = transformers.BeitConfig(**{**CONFIG, "use_relative_position_bias": True})
    with pytest.raises(UnsupportedError, match="BeitModel cannot be wrapped"):
        vtprune.wrap(transformers.BeitModel(config), "tome", reduce=8)
    with pytest.raises(ConfigError, match="takes a transformers model"):
        vtprune.wrap(nn.Linear(2, 2), "tome", reduce=8)


def test_a_mask_is_refused_where_tokens_leave() -> None:
    model, x = build("vit"), images()
    mask = torch.ones(65, 65).bool()
    with vtprune.wrap(model, "tome", reduce=8), pytest.raises(UnsupportedError, match="attn_mask"):
        model(x, attn_mask=mask)
    with vtprune.wrap(model, "tome", reduce=0):
        model(x, attn_mask=mask)


def test_padded_patches_are_refused_where_tokens_leave() -> None:
    model = build("naflex_gap")
    axis = torch.arange(4)
    patches = {
        "patches": torch.randn(1, 16, 8 * 8 * 3),
        "patch_coord": torch.cartesian_prod(axis, axis)[None],
        "patch_valid": torch.ones(1, 16).bool(),
    }
    plain = model(patches)
    with vtprune.wrap(model, "tome", reduce=0):
        assert torch.equal(model(patches), plain)
    with vtprune.wrap(model, "tome", reduce=2), pytest.raises(UnsupportedError, match="attn_mask"):
        model(patches)


def test_every_class_has_one_adapter() -> None:
    served = [name for adapter in vit_adapter_classes() for name in adapter.classes]
    assert len(served) == len(set(served)) >= 9
    assert not {*served} & {*HOMES, *REFUSED} and not {*HOMES} & {*REFUSED}


@pytest.mark.parametrize("strategy", strategy_names())
def test_every_strategy_runs_or_says_why_not(strategy: str) -> None:
    model, x = build("CLIPVisionModel"), images()
    plain = answer(model, x)
    try:
        handle: Any = vtprune.wrap(model, strategy, keep=0.5)
    except (ConfigError, UnsupportedError) as error:
        assert strategy not in ("tome", "random", "strided", "fastervlm"), error
        words = ("language", "projector", "needs", "gates", "keepers", "no token leaves")
        assert any(word in str(error) for word in words), error
    else:
        with handle:
            try:
                answer(model, x)
                assert handle.report().images[0].kept <= PATCHES // 2 + 1
            except UnsupportedError as error:
                assert "[CLS]" in str(error)
    assert torch.equal(answer(model, x), plain)
