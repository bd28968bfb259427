"""LLaVA-NeXT inside vLLM, pruned after its tower; the newlines of an image all stay."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextImageEmbeddingInputs,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from vtprune.serve.towers import PIXELS, LlavaNextTower
from vtprune.serve.vllm_common import Pruner, Ragged, static_of


class Embeddings(LlavaNextImageEmbeddingInputs):
    """Images given as embeddings, which may keep different counts."""

    data: Ragged


class Info(LlavaNextProcessingInfo):
    """Counts what stays of an image, by its size."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self._static = static_of(LlavaNextTower, self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self._static.counts({"image_sizes": [[image_height, image_width]]})[0]

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size that costs the tower most, whatever stays of it."""
        height, width = max(self.get_hf_config().image_grid_pinpoints, key=self._patches)
        return ImageSize(width=width, height=height)

    def _patches(self, size: Sequence[int]) -> int:
        return sum(shape.free for shape in self._static.shapes({"image_sizes": [list(size)]}))


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder
)
class VtpruneLlavaNext(LlavaNextForConditionalGeneration):
    """Takes images, of which it keeps what the configuration says, and embeddings as they are."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._prune = Pruner(LlavaNextTower, self, vllm_config)

    def unpruned(self, pixels: Any) -> Sequence[Tensor]:
        return super()._process_image_input(pixels)

    def _parse_and_validate_image_input(self, **kwargs: Any) -> Any:
        if kwargs.get("pixel_values") is None and kwargs.get("image_embeds") is not None:
            return Embeddings(type="image_embeds", data=kwargs["image_embeds"])
        return super()._parse_and_validate_image_input(**kwargs)

    def _process_image_input(self, image_input: Any) -> Any:
        if isinstance(image_input, Embeddings):
            return image_input["data"]
        batch = {"image_sizes": image_input["image_sizes"].tolist()}
        tiles: Any = self._prune.static.adapter
        # Images of one prompt come filled up to the most tiles that one of them has.
        real = zip(image_input["pixel_values"], tiles.n_tiles(batch), strict=True)
        image_input.pixel_values = [pixels[:n] for pixels, n in real]
        return self._prune({**batch, PIXELS: image_input})
