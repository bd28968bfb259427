"""``wrap`` for ViTs: which adapter serves one, by its class or that of the tower inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vtprune.engine.vit_handle import ViTHandle
from vtprune.engine.vit_plan import Reduce, plan
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.registry import build, vit_adapter_classes
from vtprune.vit_adapters._base import ViTAdapter

# Models of several parts, by where their tower is.
HOMES = {
    **dict.fromkeys(("open_clip.CLIP", "open_clip.CustomTextCLIP", "open_clip.CoCa"), "visual"),
    "open_clip.TimmModel": "trunk",
    **{f"transformers.{name}": "vision_model" for name in ("CLIPModel", "SiglipModel")},
    "transformers.CLIPVisionModelWithProjection": "vision_model",
    "transformers.CLIPForImageClassification": "vision_model",
    "transformers.SiglipForImageClassification": "vision_model",
    "transformers.ViTForImageClassification": "vit",
    "transformers.Dinov2ForImageClassification": "dinov2",
    "transformers.Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
}
_WINDOWS = "its blocks attend in windows or pool tokens, which needs every patch in its place"
_BIAS = "its attention adds a bias by the places of two patches, which merged tokens have not"
REFUSED = {
    **dict.fromkeys(("timm.Beit", "timm.VisionTransformerRelPos"), _BIAS),
    **dict.fromkeys(("transformers.BeitModel", "transformers.Data2VecVisionModel"), _BIAS),
    "timm.VisionTransformerSAM": f"{_WINDOWS}, and adds a bias by place",
    "timm.Hiera": _WINDOWS,
    "timm.HieraDet": _WINDOWS,
    **dict.fromkeys(("timm.SwinTransformer", "timm.SwinTransformerV2"), _WINDOWS),
    **dict.fromkeys(("transformers.SwinModel", "transformers.Swinv2Model"), _WINDOWS),
    **dict.fromkeys(
        ("timm.MultiScaleVit", "timm.MaxxVit", "timm.PoolingVisionTransformer"), _WINDOWS
    ),
    "timm.FeatureListNet": "it cuts a ViT into features; wrap the model before that",
    "open_clip.ModifiedResNet": "it is no ViT but a ResNet",
}


def find_vit(model: nn.Module) -> ViTAdapter | None:
    """Returns the adapter of a ViT, None for a model that is none of the known kinds.

    Raises:
        UnsupportedError: a ViT, or a model of a library of them, that cannot be served.
    """
    known = {name: cls for cls in vit_adapter_classes() for name in cls.classes}
    tower: Any = model
    while home := _named(tower, HOMES):
        tower = getattr(tower, HOMES[home])
    name = _named(tower, known)
    if name is not None:
        return known[name](tower, model)
    refused, own = _named(tower, REFUSED), _name(type(tower))
    if refused is not None:
        raise UnsupportedError(f"{own} cannot be wrapped: {REFUSED[refused]}.")
    if tower is model and own.partition(".")[0] not in ("timm", "open_clip"):
        return None
    raise UnsupportedError(
        f"{own} is no ViT that is known. Known: {', '.join(sorted(known))}, and models that hold "
        "one of them."
    )


def wrap_vit(
    model: nn.Module,
    adapter: ViTAdapter,
    strategy: Any,
    keep: Any,
    reduce: Reduce | None,
    layers: Sequence[int] | None,
    options: Mapping[str, Any],
    others: Mapping[str, Any],
) -> ViTHandle:
    """Wraps a ViT; arguments as of ``wrap``, ``others`` those for language models.

    Raises:
        ConfigError: one of ``others`` is given, or a list of strategies.
    """
    family = adapter.facts.family
    if odd := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"{', '.join(odd)}: {family} is a ViT, without any text. Leave it out.")
    if isinstance(strategy, (list, tuple)) or isinstance(keep, (list, tuple)):
        raise ConfigError(f"{family} is a ViT, which takes one strategy and one keep=, no lists.")
    chosen = build(strategy, **options).beside(home(model))
    return ViTHandle(model, adapter, plan(chosen, adapter, keep, reduce, layers))


def home(model: Any) -> str:
    """Returns the folder that a model was loaded from, "" where it is not known."""
    found = getattr(getattr(model, "config", None), "name_or_path", None)
    local = getattr(model, "pretrained_cfg", None) or {}  # of timm, of "local-dir:..."
    return found or (local.get("file") if local.get("source") == "local-dir" else None) or ""


def _name(cls: type) -> str:
    """Returns the name of a class, with its package first."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _named(module: object, names: dict[str, Any]) -> str | None:
    """Returns the name in ``names`` of the nearest class of ``module``."""
    return next((n for cls in type(module).__mro__ if (n := _name(cls)) in names), None)
