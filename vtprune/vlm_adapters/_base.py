"""What the engine asks of a model family. An adapter states facts; it holds no procedure."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vtprune.errors import UnsupportedError
from vtprune.types import Facts


class VLMAdapter(ABC):
    """One family of vision-language models.

    Attributes:
        classes: names of the transformers classes it serves.
        pixels: keyword under which the model takes images.
        fixed: keywords that change what the encoder yields; refused while wrapped.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    pixels: ClassVar[str] = "pixel_values"
    fixed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base: Any = model.base_model

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What strategies may know; UnsupportedError for a configuration that cannot work."""

    @property
    @abstractmethod
    def placeholder(self) -> int:
        """Token id that stands for one visual token in ``input_ids``."""

    @property
    @abstractmethod
    def tower(self) -> PreTrainedModel:
        """The vision tower; its configuration names the attention implementation."""

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """Returns tower block ``layer`` (0-based); its output is ``[B, prefix + N, C]``."""

    @abstractmethod
    def attention(self, layer: int) -> nn.Module:
        """Returns the module of that block that calls the attention interface."""

    @abstractmethod
    def grid(self, n: int) -> tuple[int, int, int] | None:
        """Returns the ``(t, h, w)`` of an image with ``n`` visual tokens."""

    @property
    def n_prefix(self) -> int:
        """Tokens before the first patch in the tower's sequence."""
        return 1 if self.facts.has_cls else 0

    @property
    def language_model(self) -> Any:
        return self.base.language_model

    @property
    def decoder(self) -> Sequence[nn.Module]:
        """The layers of the language model."""
        return self.language_model.layers

    def encode(self, batch: Mapping[str, Any]) -> Any:
        """Runs the tower and the projector on the pixels of ``batch``."""
        given = [name for name in self.fixed if batch.get(name) is not None]
        if given:
            raise UnsupportedError(
                f"{', '.join(given)}: cannot be changed per call while the model is wrapped, since "
                "the hooks sit on the configured layers. Set it in model.config and wrap again."
            )
        known = inspect.signature(self.base.get_image_features).parameters
        inputs = {k: v for k, v in batch.items() if k in known and k != "kwargs" and v is not None}
        return self.base.get_image_features(**inputs, return_dict=True)

    def items(self, output: Any) -> list[Tensor]:
        """Returns the projected tokens of each image, ``[n_i, D]``."""
        return list(output.pooler_output)

    def pack(self, output: Any, items: Sequence[Tensor]) -> Any:
        """Returns a copy of ``output`` that holds ``items`` in the container the model expects."""
        return type(output)(**{**output, "pooler_output": list(items)})
