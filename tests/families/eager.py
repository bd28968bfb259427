"""What an eager, unwrapped copy of a tiny model shows: attention, and what each token is made of.

Nothing here asks an adapter. Attention is recorded where transformers computes it; which patches
make which token is read off the model's own derivatives.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import batches
from vtprune.eval import tiny
from vtprune.types import (
    ClsRow,
    Flow,
    Guidance,
    Keys,
    Patches,
    Received,
    TowerNeed,
    ValueNorm,
    WideClsRow,
    WideKeys,
)

Batch = dict[str, Tensor]
# Queries [B, H, S, d], keys and values [B, Hkv, S, d], probabilities [B, H, S, S].
Call = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tower:
    """Where a tower's blocks are below the base model, and which of them matter.

    Attributes:
        feature: block whose output is projected; ``readable`` those that may give signals.
        averages: whether the connector is known to weigh the patches of a token, as pooling does.
            Elsewhere it stacks them, and their signals count alike.
    """

    blocks: str
    attention: str = "self_attn"
    feature: int = 3
    n_prefix: int = 0
    readable: tuple[int, ...] = (0, 1, 2, 3)
    averages: bool = False


_TO_2 = (0, 1, 2)
_CLIP = Tower("vision_tower.encoder.layers", feature=2, n_prefix=1, readable=_TO_2)
_SIGLIP = Tower("vision_tower.encoder.layers")
_POOLED = Tower("vision_tower.encoder.layers", averages=True)
_TILED = Tower("vision_model.encoder.layers")
_QWEN = Tower("visual.blocks", "attn")
TOWERS = {
    "gemma3": _POOLED,
    "idefics3": _TILED,
    "internvl": Tower("vision_tower.encoder.layer", "attention", n_prefix=1),
    "llava": _CLIP,
    "llava_next": _CLIP,
    "llava_next_video": Tower(_CLIP.blocks, "self_attn", 2, 1, _TO_2, averages=True),
    "llava_onevision": _POOLED,
    "llava_siglip": Tower("vision_tower.encoder.layers", feature=2, readable=_TO_2),
    "mistral3": Tower("vision_tower.transformer.layers", "attention"),
    "paligemma": _SIGLIP,
    "qwen2_5_vl": Tower("visual.blocks", "attn", readable=(1, 3)),
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": _TILED,
    "video_llava": Tower("{}_tower.encoder.layers", feature=2, n_prefix=1, readable=_TO_2),
}


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    """Model and processor, shared: leave them as they are."""
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    return tiny.build(family, attention)


@cache
def inputs_of(family: str, kind: str) -> Batch:
    return batches.batch(model_of(family)[1], kind)


def modalities(family: str, kind: str) -> list[str]:
    """Returns the kinds of pixels in a batch, in the order in which items are reported."""
    images = any(
        name in inputs_of(family, kind) for name in ("pixel_values", "pixel_values_images")
    )
    videos = "pixel_values_videos" in inputs_of(family, kind)
    return ["image"] * images + ["video"] * videos


def wanted(family: str) -> tuple[TowerNeed, ...]:
    """Returns everything that the family's tower can be asked for."""
    tower = TOWERS[family]
    read = (Received, Keys, WideKeys, ValueNorm, Guidance, Flow)
    read = (*read, ClsRow, WideClsRow) if tower.n_prefix else read
    reduced = tuple(need(layer) for layer in tower.readable for need in read)
    return (*reduced, Patches(tower.feature))


def encode(family: str, kind: str, name: str, attention: str = "eager") -> Any:
    """Encodes the images or videos of a batch, as the unwrapped model does."""
    base, inputs = model_of(family, attention)[0].base_model, inputs_of(family, kind)
    encoder = getattr(base, f"get_{name}_features")
    known = inspect.signature(encoder).parameters
    given = {key: value for key, value in inputs.items() if key in known}
    return encoder(**given, return_dict=True)


def flat(output: Any) -> Tensor:
    """Returns all visual tokens ``[n, D]`` in the order in which they enter the prompt."""
    features = output.pooler_output
    whole = features if isinstance(features, Tensor) else torch.cat(list(features))
    return whole.flatten(0, -2)


def lengths(family: str, kind: str, name: str) -> list[int]:
    """Returns the visual tokens of each item."""
    with torch.no_grad():
        output = encode(family, kind, name)
    if family in ("idefics3", "smolvlm"):
        return [9] * (len(flat(output)) // 9)  # a tile is an item
    if family == "video_llava" and name == "video":
        return [len(flat(output))]  # one video, handed over frame by frame
    return [item.shape[:-1].numel() for item in output.pooler_output]


# -- attention ---------------------------------------------------------------------------------


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Records what the eager attention of these modules is given and returns, call by call."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def recorder(right: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            output, probabilities = right(module, query, key, value, *args, **kwargs)
            if module in calls:
                calls[module].append((query, key, value, probabilities))
            return output, probabilities

        return attend

    with pytest.MonkeyPatch.context() as patch:
        for file in {type(module).__module__ for module in modules}:
            right = sys.modules[file].eager_attention_forward
            patch.setattr(sys.modules[file], "eager_attention_forward", recorder(right))
        yield calls


def blocks_of(model: Any, family: str, name: str) -> Any:
    return attrgetter(TOWERS[family].blocks.format(name))(model.base_model)


@cache
@torch.no_grad()
def patches(family: str, kind: str, name: str) -> dict[TowerNeed, Tensor]:
    """Returns all quantities of all patches, ``[P, ...]`` in the order of the tower."""
    tower, model = TOWERS[family], model_of(family, "eager")[0]
    blocks = blocks_of(model, family, name)
    modules = {i: getattr(blocks[i], tower.attention) for i in tower.readable}
    outputs: list[Tensor] = []
    p = tower.n_prefix

    def keep(output: Tensor) -> None:
        outputs.append(output[..., p:, :].flatten(0, -2))

    with recording(list(modules.values())) as calls, feature_hook(family, name, keep):
        encode(family, kind, name)
    reduced = {
        need: torch.cat([_quantity(need, *call, p).flatten(0, 1) for call in made])
        for need in wanted(family)
        if need.layer in modules and (made := calls[modules[need.layer]])
        if not isinstance(need, Patches)
    }
    return reduced | {Patches(tower.feature): torch.cat(outputs)}


def _quantity(
    need: TowerNeed, queries: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor, p: int
) -> Tensor:
    """One quantity ``[B, N, ...]`` of one call of a module."""
    if isinstance(need, (Flow, Guidance)):
        made, more = (flow, (2,)) if isinstance(need, Flow) else (guidance, ())
        whole = keys.new_zeros(len(keys), keys.shape[2], *more)
        for own in (probabilities[0, 0] > 0).unique(dim=0):  # an image of its sequence
            at = own.nonzero()[:, 0]
            whole[:, at[p:]] = made(queries[:, :, at], keys[:, :, at], values[:, :, at], p)
        return whole[:, p:]
    if isinstance(need, ValueNorm):
        return values.square().sum((1, 3)).sqrt()[:, p:]
    if isinstance(need, (WideKeys, WideClsRow)):
        wide_q, wide_k = (x.transpose(1, 2).flatten(2) for x in (queries, keys))
        if isinstance(need, WideKeys):
            return wide_k[:, p:]
        return (wide_q[:, 0, None] @ wide_k.mT * wide_k.shape[2] ** -0.5).softmax(-1)[:, 0, p:]
    if isinstance(need, Keys):
        return keys.mean(1)[:, p:]
    if isinstance(need, ClsRow):
        return probabilities[:, :, 0, p:].mean(1)
    # Several images may share a sequence; each is seen by the queries of its own alone.
    seen = (probabilities > 0).sum((1, 2))
    return (probabilities.sum((1, 2)) / seen)[:, p:]


def flow(q: Tensor, k: Tensor, v: Tensor, p: int) -> Tensor:
    """``Flow`` by its definition, of ``[B, H, S, d]`` each: ``[B, N, 2]``."""
    query, anchor = (x[:, :, :1] if p else x.mean(2, keepdim=True) for x in (q, v))
    relation = (query @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, p:]
    semantic = (anchor @ v.mT).softmax(-1).mean(1)[:, 0, p:]
    relation, semantic = (x / x.sum(1, keepdim=True) for x in (relation, semantic))
    density = v.mean(1).abs().sum(-1)[:, p:]
    return torch.stack([relation, (relation + semantic) * density], -1)


def guidance(q: Tensor, k: Tensor, v: Tensor, p: int) -> Tensor:
    """``Guidance`` by its definition, of ``[B, H, S, d]`` each: ``[B, N]``."""
    query = q[:, :, p - 1 : p] if p else q.mean(2, keepdim=True)
    product = (k * query).sum((1, 3))
    return (product / (k.square().sum((1, 3)) * query.square().sum((1, 3))).sqrt())[:, p:]


# -- what tokens are made of ---------------------------------------------------------------------


@contextmanager
def feature_hook(
    family: str, name: str, change: Callable[[Tensor], Tensor | None], attention: str = "eager"
) -> Iterator[None]:
    """Changes the output of the block that yields the features, before anything captures it."""
    block = blocks_of(model_of(family, attention)[0], family, name)[TOWERS[family].feature]
    hook = block.register_forward_hook(lambda m, i, output: change(output), prepend=True)
    try:
        yield
    finally:
        hook.remove()


@cache
def mapping(family: str, kind: str, name: str) -> Tensor:
    """Returns the weight of each patch in each token, ``[n, P]``; 0 in a token made of no patch.

    All patches are set to one and the same vector. A token's derivatives by them then differ by
    nothing but their weights.
    """
    leaf: list[Tensor] = []

    def same(output: Tensor) -> Tensor:
        vector = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
        leaf.append(vector.expand(output.shape).clone().requires_grad_())
        return leaf[0]

    with feature_hook(family, name, same), torch.enable_grad():
        tokens = flat(encode(family, kind, name))
        direction = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(1))
        (slope,) = torch.autograd.grad(
            tokens @ direction, leaf, torch.eye(len(tokens)), is_grads_batched=True
        )
    slope = slope[..., TOWERS[family].n_prefix :, :].flatten(1, -2).norm(dim=-1)
    if not TOWERS[family].averages:
        slope = (slope > 0).float()
    return slope / slope.sum(1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def touched(family: str, kind: str, name: str, patch: int) -> Tensor:
    """Returns which tokens change when noise is added to one patch, ``[n]`` bool."""

    def noisy(output: Tensor) -> Tensor:
        p, out = TOWERS[family].n_prefix, output.clone()
        rows = out[..., p:, :]
        width = rows.shape[-2]
        row = rows[patch] if rows.ndim == 2 else rows[patch // width, patch % width]
        row += torch.randn(row.shape, generator=torch.Generator().manual_seed(patch))
        return out

    before = flat(encode(family, kind, name))
    with feature_hook(family, name, noisy):
        after = flat(encode(family, kind, name))
    return (after != before).any(1)


# -- the language model --------------------------------------------------------------------------


@cache
@torch.no_grad()
def decoder_calls(family: str, kind: str) -> list[tuple[Any, Call]]:
    """Returns the attention module of each decoder layer, and its call on the prompts."""
    model = model_of(family, "eager")[0]
    base = model.base_model
    text = getattr(base, "language_model", None) or base.text_model
    modules: list[Any] = [layer.self_attn for layer in text.layers]
    with recording(modules) as calls:
        model(**inputs_of(family, kind))
    return [(module, calls[module][0]) for module in modules]


def last_rows(family: str, kind: str) -> list[Tensor]:
    """Returns for each decoder layer the attention of the last prompt token, ``[B, L]``."""
    return [call[3][:, :, -1].mean(1) for _, call in decoder_calls(family, kind)]


def last_flows(family: str, kind: str, visual: Tensor) -> list[Tensor]:
    """Returns for each decoder layer ``LastFlow`` of the ``visual`` tokens, ``[B, L]`` as they."""
    return [
        last_flow(*call[:3], visual, module.scaling) for module, call in decoder_calls(family, kind)
    ]


def last_flow(q: Tensor, k: Tensor, v: Tensor, visual: Tensor, scale: float) -> Tensor:
    """``LastFlow`` by its definition; the last column is the last token. 0 of other columns."""
    out = torch.zeros(visual.shape)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for b, seen in enumerate(visual):
        if seen.any():
            relation = (q[b, :, -1:] @ k[b][:, seen].mT * scale).softmax(-1).mean(0)[0]
            semantic = (v[b, :, -1:] @ v[b][:, seen].mT * v.shape[-1] ** -0.5).softmax(-1)
            semantic = semantic.mean(0)[0]
            shares = relation / relation.sum() + semantic / semantic.sum()
            out[b, seen] = shares * v[b][:, seen].mean(0).abs().sum(-1)
    return out
