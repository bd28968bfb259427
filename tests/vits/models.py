"""Small ViTs with random weights, one for each kind that is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vtprune
from vtprune.engine.vit_handle import ViTHandle

PATCHES, DEPTH = 64, 3  # an 8 x 8 grid

TIMM = {
    "vit": "vit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "registers": "vit_small_patch14_reg4_dinov2",
    "clip": "vit_base_patch16_clip_224",
    "siglip_map": "vit_base_patch16_siglip_224",
    "siglip_gap": "vit_base_patch16_siglip_gap_224",
    "eva02_fused": "eva02_tiny_patch14_224",
    "eva02_split": "eva02_base_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "rope": "vit_small_patch16_rope_224",
    "rope_mixed": "vit_small_patch16_rope_mixed_224",
    "rope_reg1_gap": "vit_mediumd_patch16_rope_reg1_gap_256",
    "rope_reg4_gap": "vit_betwixt_patch16_rope_reg4_gap_256",
    "pe_core": "vit_pe_core_tiny_patch16_384",
    "naflex_map": "naflexvit_base_patch16_siglip",
    "naflex_gap": "naflexvit_base_patch16_gap",
    "naflex_axial": "naflexvit_base_patch16_gap",
    "naflex_mixed": "naflexvit_base_patch16_gap",
}
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": DEPTH, "num_heads": 3}
CLIP = {"image_size": 64, "patch_size": 8, "width": 64, "layers": DEPTH, "head_width": 16}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "open_clip": {},
    "open_clip_avg": {"pool_type": "avg", "final_ln_after_pool": True, "output_tokens": True},
    "open_clip_custom": {
        **{"qk_norm": True, "scale_heads": True, "scale_attn": True, "scale_attn_inner": True},
        "ls_init_value": 0.1,
    },
    "open_clip_coca": {"attentional_pool": True, "attn_pooler_queries": 4},
}
CONFIG = {
    **{"hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "mlp_ratio": 2},
    **{"intermediate_size": 96, "image_size": 64, "patch_size": 8, "num_labels": 5},
}
TRANSFORMERS: dict[str, tuple[str, str]] = {
    "CLIPVisionModel": ("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIPVisionModelWithProjection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "CLIPForImageClassification": ("CLIPForImageClassification", "CLIPConfig"),
    "SiglipVisionModel": ("SiglipVisionModel", "SiglipVisionConfig"),
    "SiglipForImageClassification": ("SiglipForImageClassification", "SiglipConfig"),
    "ViTForImageClassification": ("ViTForImageClassification", "ViTConfig"),
    "Dinov2ForImageClassification": ("Dinov2ForImageClassification", "Dinov2Config"),
    "Dinov2Model": ("Dinov2Model", "Dinov2Config"),
    "Dinov2WithRegistersForImageClassification": (
        *("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    ),
}
NAMES = [*TIMM, *OPEN_CLIP, "open_clip_timm", *TRANSFORMERS]
NAFLEX_ROPE = ["naflex_axial", "naflex_mixed"]
ROPE = ["eva02_fused", "eva02_split", "dinov3", "rope", "rope_mixed", "pe_core"]


def build(name: str) -> Any:
    """Returns the model in evaluation mode; skips the test where its library is missing."""
    torch.manual_seed(0)
    model = _scaled(_make(name))
    return model.eval()


def _make(name: str) -> nn.Module:
    if name in TRANSFORMERS:
        return _transformers(*TRANSFORMERS[name])
    if name in TIMM:
        timm = pytest.importorskip("timm")
        small = {k: v for k, v in SMALL.items() if "naflex" not in name or k != "img_size"}
        small |= {"rope_type": name.partition("_")[2]} if name in NAFLEX_ROPE else {}
        return timm.create_model(TIMM[name], num_classes=7, **small)
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    if name == "open_clip_timm":
        from open_clip.timm_model import TimmModel

        make: Callable[..., nn.Module] = TimmModel
        tower: Any = make("vit_tiny_patch16_224", 16, image_size=64, pool="avg", proj="linear")
        timm = pytest.importorskip("timm")
        tower.trunk = timm.create_model(
            TIMM["siglip_gap"], num_classes=0, **{**SMALL, "embed_dim": tower.trunk.embed_dim}
        )
        return tower
    vision = {**CLIP, **OPEN_CLIP[name]}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual


def _transformers(model: str, config: str) -> nn.Module:
    make = getattr(transformers, config)
    if config in ("CLIPConfig", "SiglipConfig"):
        return getattr(transformers, model)(make(vision_config=CONFIG, num_labels=5))
    return getattr(transformers, model)(make(**CONFIG))


def _scaled(model: nn.Module) -> nn.Module:
    """Gives weights a size at which attention is no mean and every layer scale counts."""
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=1.2 / p[0].numel() ** 0.5)
        elif "gamma" in name or "lambda" in name:
            nn.init.uniform_(p, 0.5, 1.0)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def wrap(model: Any, *args: Any, **kwargs: Any) -> ViTHandle:
    handle: Any = vtprune.wrap(model, *args, **kwargs)
    assert isinstance(handle, ViTHandle)
    return handle


def assert_one_graph(model: Any, x: Tensor, backend: str = "aot_eager") -> None:
    """The wrapped model compiles as a whole, and answers as it does without."""
    expected = answer(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(answer(compiled, x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def answer(model: Any, x: Tensor) -> Tensor:
    """What the model is for: logits, an embedding, or what it pools."""
    out = model(x)
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple):
        return out[0]
    names = ("logits", "image_embeds", "pooler_output")
    return next(v for name in names if (v := getattr(out, name, None)) is not None)
