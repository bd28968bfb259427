"""What the engine asks of a model family. An adapter states facts; it holds no procedure."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vtprune.errors import UnsupportedError
from vtprune.types import Facts

Batch = Mapping[str, Any]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Modality:
    """One kind of visual input.

    Attributes:
        name: ``image`` or ``video``, as the model calls it.
        pixels: keywords under which the model takes it.
        placeholder: id in ``input_ids`` that stands for one of its visual tokens.
        item: what one entry of the encoder's output is, for reports.
    """

    name: str
    pixels: tuple[str, ...]
    placeholder: int
    item: str

    def given(self, batch: Batch) -> bool:
        """Returns whether ``batch`` holds some."""
        return any(batch.get(name) is not None for name in self.pixels)


class VLMAdapter(ABC):
    """One family of vision-language models.

    Attributes:
        classes: names of the transformers classes it serves.
        title: what the family is called in tables.
        towers: its vision towers, for tables.
        takes: its kinds of visual input, for tables.
        fixed: keywords that change what the encoder yields; refused while wrapped.
        item: what one entry of the encoder's output for images is.
        newlines: whether tokens made of no patch end the row before them.
        first_position: position id of the first token.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""
    towers: ClassVar[str] = ""
    takes: ClassVar[str] = "images"
    fixed: ClassVar[tuple[str, ...]] = ()
    item: ClassVar[str] = "image"
    newlines: ClassVar[bool] = False
    first_position: ClassVar[int] = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base: Any = model.base_model

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What strategies may know; UnsupportedError for a configuration that cannot work."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The kinds of visual input, in the order in which they are encoded and reported."""
        ids = self.model.config
        image = Modality("image", ("pixel_values",), ids.image_token_id, self.item)
        if not hasattr(self.base, "get_video_features"):
            return (image,)
        return image, Modality("video", ("pixel_values_videos",), ids.video_token_id, "video")

    # -- the tower -----------------------------------------------------------------------------

    def tower(self, modality: Modality) -> Any:
        """The vision tower; its configuration names the attention implementation."""
        return self.base.vision_tower

    def blocks(self, modality: Modality) -> Sequence[nn.Module]:
        """The tower's blocks; the output of one is ``[B, prefix + N, C]``."""
        return self.tower(modality).encoder.layers

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        """Returns the module of a block (0-based) that calls the attention interface."""
        block: Any = self.blocks(modality)[layer]
        return block.self_attn

    @property
    def n_prefix(self) -> int:
        """Tokens before the first patch in the tower's sequence."""
        return 1 if self.facts.has_cls else 0

    def segments(self, modality: Modality, batch: Batch) -> list[int] | None:
        """Returns the patches of each image or frame where a tower packs them into one sequence."""
        return None

    @abstractmethod
    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        """Carries values of patches to the visual tokens, as the model's connector does.

        Args:
            patches: ``[P, C]`` of all patches in the order of the tower, float, on any device.

        Returns:
            Per item ``[n_i, C]``; NaN for a token that is made of no patch.
        """

    # -- what the encoder yields -----------------------------------------------------------------

    def encode(self, modality: Modality, batch: Batch) -> Any:
        """Runs the tower and the projector on the pixels of ``batch``."""
        given = [name for name in self.fixed if batch.get(name) is not None]
        if given:
            raise UnsupportedError(
                f"{', '.join(given)}: cannot be changed per call while the model is wrapped, since "
                "the hooks sit on the configured layers. Set it in model.config and wrap again."
            )
        encoder = getattr(self.base, f"get_{modality.name}_features")
        known = inspect.signature(encoder).parameters
        inputs = {k: v for k, v in batch.items() if k in known and k != "kwargs" and v is not None}
        return encoder(**inputs, return_dict=True)

    def tokens(self, modality: Modality, output: Any, batch: Batch) -> list[Tensor]:
        """Returns the projected tokens of each item, ``[n_i, D]``."""
        return [x.flatten(0, -2) for x in output.pooler_output]

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        """Returns the ``(t, h, w)`` of items with these numbers of tokens made of patches."""
        return [square(n) for n in lengths]

    def planes(self, output: Any) -> Sequence[Sequence[Tensor]]:
        """Returns features for later layers, per plane and item ``[n_i, D]``."""
        return getattr(output, "deepstack_features", None) or ()

    def pack(self, output: Any, items: Sequence[Tensor], planes: Sequence[Sequence[Tensor]]) -> Any:
        """Returns a copy of ``output`` that holds ``items`` in the container the model expects."""
        features: Any = list(items)
        if isinstance(output.pooler_output, Tensor):
            even = len({len(x) for x in items}) == 1
            features = torch.stack(features) if even else torch.cat(features)[:, None]
        changed = {"pooler_output": features}
        if planes:
            changed["deepstack_features"] = [list(plane) for plane in planes]
        return type(output)(**{**output, **changed})

    # -- the language model ----------------------------------------------------------------------

    @property
    def language_model(self) -> Any:
        return getattr(self.base, "language_model", None) or self.base.text_model

    @property
    def decoder(self) -> Sequence[nn.Module]:
        """The layers of the language model."""
        return self.language_model.layers

    def positions(self, batch: Batch, ids: Tensor) -> Tensor:
        """Returns the position ids of an unwrapped ``forward``, ``[B, L]`` or ``[R, B, L]``."""
        given = batch.get("position_ids")
        if given is not None:
            return given if given.ndim == 3 else given.expand(len(ids), -1)
        if self.facts.mrope and batch.get("mm_token_type_ids") is not None:
            prepare: Any = self.model._prepare_position_ids_for_generation
            text = {k: v for k, v in batch.items() if not k.startswith("pixel_values")}
            return prepare(ids, text)
        first = self.first_position
        return torch.arange(first, first + ids.shape[1], device=ids.device).expand(ids.shape)


def square(n: int, frames: int = 1) -> Grid | None:
    """Returns the grid of ``n`` tokens that fill squares, one per frame, or None."""
    side = math.isqrt(n // frames)
    return (frames, side, side) if frames * side * side == n else None


def frames(batch: Batch) -> int:
    """Returns the frames of each video where all have equally many."""
    return batch["pixel_values_videos"].shape[1]
