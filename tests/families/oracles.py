"""What must hold of every wrapped call, on a family's tiny model.

Keeping everything is bit-identical to the unwrapped model; dropping or merging equals the
full-length model that hides the others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.families import batches
from tests.families.merges import merging
from tests.families.reference import Reference, mixed
from tests.hidden import Watch
from tests.probes import generate
from vtprune import Handle
from vtprune.eval import tiny
from vtprune.types import Site

STEPS = 10


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    """Model and processor, shared: leave them as they are."""
    return tiny.build(family, attention)


@cache
def inputs_of(family: str, kind: str) -> batches.Batch:
    return batches.batch(model_of(family)[1], kind)


@cache
def plain(family: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the unwrapped model makes: ids, their logits, and the logits of a direct call."""
    model, inputs = model_of(family)[0], inputs_of(family, kind)
    return *generate(model, inputs, STEPS), model(**inputs).logits


def keeps_all(family: str, kind: str, strategy: Any, keep: Any = 1.0, **wrap: Any) -> None:
    """Asserts that nothing changes where everything stays, not even a bit."""
    model, inputs = model_of(family)[0], inputs_of(family, kind)
    ids, logits, direct = plain(family, kind)
    with vtprune.wrap(model, strategy, keep=keep, **wrap):
        kept_ids, kept_logits = generate(model, inputs, STEPS)
        assert torch.equal(ids, kept_ids)
        assert torch.equal(logits, kept_logits)
        assert torch.equal(direct, model(**inputs).logits)


def gather_is_mask(
    family: str,
    inputs: batches.Batch,
    wrap: dict[str, Any],
    attention: str = "sdpa",
    steps: int = STEPS,
    **call: Any,
) -> Handle:
    """Asserts that a call equals the full-length model in which what left is hidden.

    Args:
        wrap: how the model is wrapped; ``call``: options of ``generate``.
    """
    model, eager = model_of(family, attention)[0], model_of(family, "eager")[0]
    watch = Watch()
    with watch.watching(), merging() as chosen, vtprune.wrap(model, **wrap) as handle:
        ids, logits = generate(model, inputs, steps, **call)
    made = None
    if any(step.stage.site is Site.ENCODER for step in handle.steps):
        made = in_tower(eager, inputs, handle) if mixes(handle) else None
    with watch.hiding(model, eager):
        wanted_ids, wanted = Reference(eager, inputs, handle, made, chosen).greedy(steps)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    return handle


def mixes(handle: Handle) -> bool:
    """Whether a token of the last call was made of others than its own."""
    return any(selection.mix is not None for selection in handle.selections)


@torch.no_grad()
def in_tower(model: Any, inputs: dict[str, Tensor], handle: Any) -> list[Tensor]:
    """Tokens of every item, mixed in the tower's own states and then projected, in slot order."""
    made: list[Tensor] = []
    adapter, base = handle.adapter, model.base_model
    for modality in dict.fromkeys(item.modality for item in handle._items):
        tower = getattr(base, f"{modality.name}_tower", None) or base.vision_tower
        pixels = next(inputs[name] for name in modality.pixels if name in inputs)
        states = _states(model, tower, pixels, inputs)
        width = states.shape[1] - adapter.n_prefix
        patches = states[:, adapter.n_prefix :].flatten(0, 1)
        owners = _patches(model, modality.name, pixels, inputs, width)
        items = [i for i in handle._items if i.modality == modality]
        first = len(made)
        for item, owner, selection in zip(
            items, owners, handle.selections[first : first + len(items)], strict=True
        ):
            tiles = (owner[owner >= 0] // width).unique()
            prefix = states[tiles, : adapter.n_prefix].flatten(0, 1)
            own = patches[owner.clamp(min=0)]
            rows = mixed(selection, torch.cat([own, prefix]))
            if not hasattr(model.config, "vision_feature_layer"):  # PaliGemma takes the tower's end
                rows = tower.post_layernorm(rows)
            rows = base.multi_modal_projector(rows[None])[0]
            plain = owner[selection.slots[0]] < 0
            rows[plain] = item.tokens[selection.slots[0][plain]]  # newlines are not made of patches
            made.append(rows)
    return made


def _states(model: Any, tower: Any, pixels: Tensor, inputs: Any) -> Tensor:
    layer = getattr(model.config, "vision_feature_layer", -1)
    if pixels.ndim == 5 and "image_sizes" in inputs and "pixel_values" in inputs:
        tiles = [int((image.flatten(1) != 0).any(1).sum()) for image in pixels]
        pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=True)])
    elif pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    seen: list[Tensor] = []
    block = tower.encoder.layers[-1 if layer == -1 else len(tower.encoder.layers) + layer]
    with block.register_forward_hook(lambda module, args, output: seen.append(output)):
        tower(pixels)
    return seen[0]


def _patches(model: Any, name: str, pixels: Tensor, inputs: Any, width: int) -> list[Tensor]:
    """Per item the patch that each of its tokens is made of, -1 = none."""
    if hasattr(model.base_model, "pack_image_features"):
        tiles = [int((image.flatten(1) != 0).any(1).sum()) for image in pixels]
        ids = torch.arange(sum(tiles) * width).float().view(-1, width, 1)
        packed, _ = model.base_model.pack_image_features(
            ids.split(tiles), inputs["image_sizes"], "default", image_newline=torch.tensor([-1.0])
        )
        return [item[:, 0].long() for item in packed]
    if name == "video":  # Video-LLaVA: [CLS] before the patches of each frame
        frames = torch.arange(pixels.shape[0] * pixels.shape[1] * width).view(-1, width)
        frames = torch.cat([frames.new_full((len(frames), 1), -1), frames], dim=1)
        return list(frames.view(len(pixels), -1))
    return list(torch.arange(len(pixels) * width).view(len(pixels), width))
