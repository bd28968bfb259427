"""Inputs for a vLLM engine whose images were pruned in transformers, as embeddings.

The engine needs no vtprune and no vision tower: ``LLM(..., enable_mm_embeds=True)``. Text-guided
and adaptive strategies, and those inside the tower, can be served in this way alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.instance import live
from vtprune.engine.plan import wrap
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.types import Keep, Selection, Strategy

# Classes of transformers whose namesakes in vLLM take embeddings of any length.
FAMILIES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)


@dataclass(frozen=True)
class VLLMInputs:
    """What ``LLM.generate`` takes, one request per prompt, and what was kept of the images.

    Attributes:
        requests: dicts with ``prompt_token_ids``, where one placeholder stands for each image, and
            ``multi_modal_data``: embeddings ``[K_i, D]`` on the CPU, in the model's dtype.
        selections: per prompt and image what was chosen, each with a batch dimension of 1;
            positions count the image's tokens as the unpruned model has them, newlines too.
    """

    requests: list[dict[str, Any]]
    selections: list[list[Selection]]

    def kept(self) -> list[list[list[int]]]:
        """Returns per prompt and image the positions whose place a kept token takes, ascending."""
        return [[one.slots[0].tolist() for one in images] for images in self.selections]


def to_vllm_inputs(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Any]],
    *,
    strategy: str | Strategy | Sequence[str | Strategy] | None = None,
    keep: Keep | Sequence[Keep] | None = None,
    ragged: bool = False,
    uuids: bool = False,
    processing: Mapping[str, Any] | None = None,
    **options: Any,
) -> VLLMInputs:
    """Prunes images by a transformers model and returns them as inputs for vLLM.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, wrapped by ``vtprune.wrap`` or to be
            wrapped with what follows; or the handle.
        processor: of that model.
        prompts: texts with an image marker (``<image>``) for each image.
        images: per prompt its images, as the processor takes them.
        strategy, keep, **options: as ``wrap`` takes them, for a model that is not wrapped.
        ragged: whether images may keep different counts. vLLM's own classes take only one; those of
            vtprune's plug-in take any.
        uuids: whether to name each image for vLLM's caches, which else hash the embeddings. A name
            covers what the embeddings depend on.
        processing: more that the processor is told, such as ``{"add_special_tokens": False}``.

    Raises:
        ConfigError: a wrapped model and a strategy beside it, or neither; or what ``wrap`` raises.
        InputError: prompts and images do not fit together.
        UnsupportedError: what vLLM cannot serve so, with the reason and the alternative.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise InputError(
            f"prompts={prompts!r} and {len(images)} lists of images; give as many lists as prompts."
        )
    with ExitStack() as undo:
        handle = _handle(model, processor, strategy, keep, options, undo)
        _check(handle)
        made = [
            _request(handle, processor, prompt, list(own), uuids, processing or {})
            for prompt, own in zip(prompts, images, strict=True)
        ]
    result = VLLMInputs([request for request, _ in made], [chosen for _, chosen in made])
    if not ragged:
        _refuse_ragged(result)
    return result


def _handle(
    model: Any,
    processor: Any,
    strategy: Any,
    keep: Any,
    options: Mapping[str, Any],
    undo: ExitStack,
) -> Handle:
    """Returns the model's handle, or one that ``undo`` removes."""
    wrapped = (one for one in live if one is model or one.model is model)
    handle: Handle | None = next(wrapped, None)
    if handle is None:
        if strategy is None:
            raise ConfigError("The model is not wrapped; give strategy= and keep=.")
        return undo.enter_context(wrap(model, strategy, keep=keep, processor=processor, **options))
    given = {"strategy": strategy, "keep": keep, **options}
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise ConfigError(
            f"{', '.join(beside)}: the model is wrapped already, which says it. Leave it out, or "
            "give a model that is not wrapped."
        )
    return handle


def _check(handle: Handle) -> None:
    """Raises UnsupportedError for what embeddings in place of images cannot carry."""
    name = type(handle.model).__name__
    if handle.adapter.facts.mrope:
        raise UnsupportedError(
            f"{name} gives positions in time, height and width to visual tokens, which vLLM makes "
            "from a whole grid. Prune inside the engine instead: --hf-overrides with the "
            "architecture VtpruneQwen2_5_VL (Qwen2.5-VL)."
        )
    if name not in FAMILIES:
        raise UnsupportedError(
            f"vLLM takes embeddings of any length in place of images only for {', '.join(FAMILIES)}"
            f", not for {name}."
        )
    if handle.acts_inside:
        raise UnsupportedError(
            "The strategy acts inside the language model, which vLLM runs: its cache holds equally "
            "many tokens in all layers, and its kernels return no attention. Use one that acts "
            "before the language model, such as 'fastervlm', or serve with transformers."
        )
    if handle.positions == "keep":
        raise UnsupportedError(
            "positions='keep': vLLM numbers the tokens that are left from 0 on. Wrap with "
            "positions='renumber' to accept that."
        )


@torch.no_grad()
def _request(
    handle: Handle,
    processor: Any,
    prompt: str,
    images: list[Any],
    uuids: bool,
    processing: Mapping[str, Any],
) -> tuple[dict[str, Any], list[Selection]]:
    marker = processor.image_token
    if prompt.count(marker) != len(images):
        raise InputError(
            f"{prompt!r} names {prompt.count(marker)} images by {marker!r}, but {len(images)} were "
            "given with it."
        )
    given = {"images": [images]} if images else {}
    batch = processor(text=[prompt], return_tensors="pt", **given, **processing)
    ids = batch["input_ids"][0].tolist()
    if not images:
        return {"prompt_token_ids": ids}, []
    batch = {k: v.to(handle.model.device) for k, v in batch.items()}
    outputs, chosen = handle.encode(batch)
    placeholder = handle.adapter.modalities[0].placeholder
    embeddings = [x.flatten(0, -2).cpu() for x in outputs["image"].pooler_output]
    request: dict[str, Any] = {
        "prompt_token_ids": _collapsed(ids, placeholder, [one.n for one in chosen]),
        "multi_modal_data": {"image": embeddings},
    }
    if uuids:
        request["multi_modal_uuids"] = {"image": _uuids(handle, batch)}
    return request, chosen


def _collapsed(ids: Sequence[int], placeholder: int, lengths: Sequence[int]) -> list[int]:
    """Returns the prompt with one placeholder for each image in place of as many as ``lengths``."""
    firsts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    short, seen = [], 0
    for token in ids:
        if token == placeholder:
            seen += 1
            if seen - 1 not in firsts:
                continue
        short.append(token)
    return short


def _uuids(handle: Handle, batch: Mapping[str, Tensor]) -> list[str]:
    """Names each image by all that its embeddings depend on.

    That is the picture as it was processed, which may differ where it is alone in its prompt; the
    model, the strategy with its options, and the budget; and the prompt and its other images
    where the strategy looks at them.
    """
    steps = [
        (repr(s.strategy), repr(s.stage.needs), s.budget.tokens, s.budget.fraction, s.scope)
        for s in handle.steps
    ]
    told: list[Any] = [handle.model.config.name_or_path, str(handle.model.dtype), steps]
    told.append(handle.newlines)
    pictures = [_digest(picture) for picture in batch["pixel_values"]]
    if any(step.stage.reads_text for step in handle.steps):
        told.append(batch["input_ids"].tolist())
    if any(step.scope == "sample" for step in handle.steps):
        told.append(pictures)
    sizes = batch["image_sizes"].tolist() if "image_sizes" in batch else [None] * len(pictures)
    names = []
    for picture, size in zip(pictures, sizes, strict=True):
        text = json.dumps([*told, picture, size])
        names.append(f"vtprune-{hashlib.sha256(text.encode()).hexdigest()}")
    return names


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _refuse_ragged(result: VLLMInputs) -> None:
    counts = sorted(
        {
            len(image)
            for request in result.requests
            for image in request.get("multi_modal_data", {}).get("image", ())
        }
    )
    if len(counts) > 1:
        raise UnsupportedError(
            f"The images keep different numbers of tokens ({counts}). vLLM's own classes take one "
            "number in an engine, or stop with 'inconsistent shapes'. Give keep= as a count and "
            "images of one size, or ragged=True for an engine with the architecture VtpruneLlava "
            'or VtpruneLlavaNext and {"vtprune": {"strategy": null}}.'
        )
