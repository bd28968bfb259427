"""The families that are pruned inside vLLM: our adapters, on its towers.

Without a model they know a configuration alone, which is enough to plan and to count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from vtprune.engine import tap
from vtprune.types import Facts, Patches
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter
from vtprune.vlm_adapters.llava import Llava
from vtprune.vlm_adapters.llava_next import LlavaNext
from vtprune.vlm_adapters.qwen2_5_vl import Qwen2_5VL

PIXELS = "pixel_values"


class Tower(VLMAdapter):
    """Gets the engine's model in place of one of transformers, or None.

    ``unpruned(pixels)`` of that model returns the projected tokens of each image, ``[n_i, D]``.
    """

    def __init__(self, config: Any, served: Any = None) -> None:
        self.model = SimpleNamespace(config=config)  # type: ignore[assignment]
        self.base = SimpleNamespace()
        self.served = served

    def per_tile(self, batch: Batch) -> list[int]:
        """Returns the patches of each tile, or of each image where there are no tiles."""
        raise NotImplementedError

    def encode(self, modality: Modality, batch: Batch) -> Any:
        """Runs the engine's tower and projector, as they are, on its own form of pixels."""
        block = self.blocks(modality)[self.facts.feature_block]
        with _outputs(block) as states:
            tokens: Any = list(self.served.unpruned(batch[PIXELS]))
        return BaseModelOutputWithPooling(last_hidden_state=states[0], pooler_output=tokens)

    def listen(self, layers: Sequence[int]) -> None:
        """Lets a tap read the attention of these blocks (0-based) of the engine's tower."""
        (image,) = self.modalities
        for layer in layers:
            attention = self.attention(image, layer)
            attention.register_forward_pre_hook(_read, with_kwargs=True)


class LlavaTower(Tower, Llava):
    """LLaVA-1.5."""

    def tower(self, modality: Modality) -> Any:
        return self.served.vision_tower.vision_model

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        block: Any = self.blocks(modality)[layer]
        return block.self_attn.attn

    def per_tile(self, batch: Batch) -> list[int]:
        return [self.n_patches] * batch["n_images"]


class LlavaNextTower(Tower, LlavaNext):
    """LLaVA-NeXT; ``image_sizes`` of the batch are (height, width) in pixels."""

    def __init__(self, config: Any, served: Any = None) -> None:
        super().__init__(config, served)
        self.base.config = config
        self.base.pack_image_features = partial(LlavaNextModel.pack_image_features, self.base)

    tower = LlavaTower.tower
    attention = LlavaTower.attention

    def per_tile(self, batch: Batch) -> list[int]:
        return [self.n_patches] * sum(self.n_tiles(batch))


class QwenTower(Tower, Qwen2_5VL):
    """Qwen2.5-VL; ``image_grid_thw`` of the batch is ``[n, 3]`` int64 on the CPU, in patches."""

    def __init__(self, config: Any, served: Any = None) -> None:
        super().__init__(config, served)
        vision = config.vision_config
        self.base.visual = SimpleNamespace(
            config=vision,
            blocks=range(vision.depth) if served is None else served.visual.blocks,
            fullatt_block_indexes=vision.fullatt_block_indexes,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        block: Any = self.blocks(modality)[layer]
        return block.attn.attn

    @property
    def facts(self) -> Facts:
        facts = super().facts
        return replace(facts, signals=facts.signals - {Patches})  # its blocks call no hooks

    def encode(self, modality: Modality, batch: Batch) -> Any:
        tokens: Any = list(self.served.unpruned(batch[PIXELS]))
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def per_tile(self, batch: Batch) -> list[int]:
        (image,) = self.modalities
        return self.segments(image, batch) or []

    def grid(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Returns the rows and columns of an image's tokens from its grid ``(t, h, w)``."""
        side = self.base.visual.spatial_merge_size
        return sizes[1] // side, sizes[2] // side


@contextmanager
def _outputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what ``block`` gives."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: object, output: Tensor) -> None:
        seen.append(output)

    hook = block.register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def _read(module: Any, args: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Hands queries, keys and values of the engine's attention to the tap of the running call."""
    reader = tap.reader()
    if reader is None or not reader.reads(module):
        return
    named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
    q, k, v = (_heads_first(x, module.head_size) for x in (*args[:3], *named))
    reader.read(module, q, k, None, module.scale, v)


def _heads_first(x: Tensor, width: int) -> Tensor:
    """Returns ``[B, S, H * d]`` or ``[B, S, H, d]`` as ``[B, H, S, d]``."""
    return (x.unflatten(-1, (-1, width)) if x.ndim == 3 else x).transpose(1, 2)
