"""LLaVA-1.5 inside vLLM, pruned after its tower."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.serve.towers import PIXELS, LlavaTower
from vtprune.serve.vllm_common import Pruner, Ragged, static_of


class Embeddings(LlavaImageEmbeddingInputs):
    """Images given as embeddings, which may keep different counts."""

    data: Ragged


class Info(LlavaProcessingInfo):
    """Counts what stays of an image."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self._static = static_of(LlavaTower, self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self._static.counts({"n_images": 1})[0]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder
)
class VtpruneLlava(LlavaForConditionalGeneration):
    """Takes images, of which it keeps what the configuration says, and embeddings as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._prune = Pruner(LlavaTower, self, vllm_config)

    def unpruned(self, pixels: Any) -> Sequence[Tensor]:
        return super()._process_image_input(pixels)

    def _parse_and_validate_image_input(self, **kwargs: Any) -> Any:
        if kwargs.get("pixel_values") is None and kwargs.get("image_embeds") is not None:
            return Embeddings(type="image_embeds", data=kwargs["image_embeds"])
        return super()._parse_and_validate_image_input(**kwargs)

    def _process_image_input(self, image_input: Any) -> Any:
        if isinstance(image_input, Embeddings):
            return image_input["data"]
        return self._prune({PIXELS: image_input, "n_images": len(image_input["pixel_values"])})
