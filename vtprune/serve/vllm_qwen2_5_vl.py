"""Qwen2.5-VL inside vLLM, pruned after its tower; tokens that stay keep their M-RoPE ids.

Which tokens stay is known once an image is encoded. So embeddings bring their places along, and the
ids of a prompt are completed when they arrive, as vLLM does for the videos that it prunes itself.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from vtprune.errors import UnsupportedError
from vtprune.serve.mrope import laid_out, placed, with_places
from vtprune.serve.towers import PIXELS, QwenTower
from vtprune.serve.vllm_common import Pruner, static_of


class Info(Qwen2_5_VLProcessingInfo):
    """Counts what stays of an image, and takes no videos."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self._static = static_of(QwenTower, self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def kept(self, n: int) -> int:
        """Returns how many of an image's ``n`` tokens stay."""
        step = self._static.step
        return n if step is None else step.budget.count(n)

    def get_num_image_tokens(self, **size: Any) -> int:
        return self.kept(super().get_num_image_tokens(**size))


class Processor(Qwen2_5_VLMultiModalProcessor):
    """Writes as many placeholders as tokens stay."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=hf_processor_mm_kwargs,
            out_mm_kwargs=out_mm_kwargs,
        )
        return [self._shortened(update) for update in updates if update.modality == "image"]

    def _shortened(self, update: Any) -> Any:
        def replacement(item: int) -> list[int]:
            ids = update.replacement(item)
            return ids[: self.info.kept(len(ids))]

        return replace(update, replacement=replacement)


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VtpruneQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):
    """Keeps of images what the configuration says."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _check(vllm_config)
        # The engine completes position ids only where it believes that it prunes videos.
        vllm_config.model_config.multimodal_config.video_pruning_rate = 0.5
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._prune = Pruner(QwenTower, self, vllm_config)
        if current_platform.is_cpu():
            _tell_cpu_runner()

    def unpruned(self, pixels: Any) -> Sequence[Tensor]:
        return super()._process_image_input(pixels)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        given = self._parse_and_validate_multimodal_inputs(**kwargs)
        if not given:
            return []
        sizes = given["image"]["image_grid_thw"].cpu()
        batch = {PIXELS: given["image"], "image_grid_thw": sizes}
        static = self._prune.static
        tokens, chosen = static.prune(batch)
        grids = map(static.adapter.grid, sizes.tolist())
        return tuple(
            with_places(x, selection.slots[0], *grid)
            for x, selection, grid in zip(tokens, chosen, grids, strict=True)
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        images = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            grid = self._prune.static.adapter.grid(feature.data["image_grid_thw"].data.tolist())
            images.append((feature.mm_position.offset, feature.mm_position.length, *grid))
        return laid_out(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        ids, marker = torch.as_tensor(input_ids), self.config.image_token_id
        return placed(ids, marker, mrope_positions, multimodal_embeddings, num_computed_tokens)


def _check(vllm_config: Any) -> None:
    """Raises UnsupportedError for what would go past the pruning, or misplace tokens."""
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.video_pruning_rate:
        raise UnsupportedError(
            f"video_pruning_rate={multimodal.video_pruning_rate}: VtpruneQwen2_5_VL takes no "
            "videos. Leave it out, or serve the stock architecture."
        )
    if multimodal.enable_mm_embeds:
        raise UnsupportedError(
            "enable_mm_embeds: embeddings of Qwen2.5-VL do not say where the tokens that they lack "
            "would be. Leave it out; VtpruneQwen2_5_VL takes images."
        )
    if multimodal.mm_encoder_tp_mode == "data":
        raise UnsupportedError(
            "mm_encoder_tp_mode='data' spreads images over ranks, whose towers cannot be read. "
            "Leave it out."
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedError(
            "Speculative decoding asks for the embeddings of an image again, shifted by a token, "
            "and would misplace them. Leave it out, or serve the stock architecture."
        )


def _tell_cpu_runner() -> None:
    """Makes vLLM's CPU runner ask the model whether it prunes, as its GPU runner does."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def prunes(runner: Any) -> bool:
        return isinstance(getattr(runner, "model", None), VtpruneQwen2_5_VL)

    # It sets an attribute of this name to False; a property of its class goes before that.
    CPUModelRunner.is_multimodal_pruning_enabled = property(prunes, lambda runner, value: None)
