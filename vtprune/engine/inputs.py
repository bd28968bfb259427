"""What a call was given: which images and videos, which tokens are real, which stand for them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.engine.generation import refuse
from vtprune.errors import InputError, UnsupportedError
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter


def given(adapter: VLMAdapter, batch: Batch) -> list[Modality]:
    """Returns the kinds of visual input that ``batch`` holds."""
    return [modality for modality in adapter.modalities if modality.given(batch)]


def visual(adapter: VLMAdapter, ids: Tensor) -> Tensor:
    """Marks the placeholders among ``ids``, bool of the same shape."""
    placeholders = [modality.placeholder for modality in adapter.modalities]
    return torch.isin(ids, torch.tensor(placeholders, device=ids.device))


def has_visuals(adapter: VLMAdapter, batch: Batch) -> bool:
    """Returns whether ``batch`` holds images or videos to prune.

    Raises:
        InputError: pixels without a prompt, or placeholders without pixels.
        UnsupportedError: encoder outputs, a prompt as embeddings, a used cache.
    """
    ids, here = batch.get("input_ids"), given(adapter, batch)
    if here and ids is None:
        refuse(batch)
        raise InputError("Pixels were given without input_ids; pass both.")
    if batch.get("mm_encoder_outputs") is not None:
        refuse(batch)
    elif ids is not None:
        known = {modality.placeholder for modality in here}
        for modality in adapter.modalities:
            n = int((ids == modality.placeholder).sum())
            if n and modality.placeholder not in known:
                raise InputError(
                    f"The prompts hold {n} {modality.name} placeholders (id "
                    f"{modality.placeholder}), but no {modality.pixels[0]} were given. Pass the "
                    f"{modality.name}s, or a prompt without them."
                )
    return bool(here)


def valid_tokens(batch: Batch, padding: int | None) -> Tensor:
    """Real tokens ``[B, L]``: by the mask, or without one all but the id ``padding``.

    Raises:
        UnsupportedError: a mask that is not the prompt's.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
    if mask.shape != ids.shape:
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; a wrapped model takes the 2-D "
            f"mask of the prompt, {tuple(ids.shape)}."
        )
    return mask.bool()
