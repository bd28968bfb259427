"""What lmms-eval asks for, as a model's inputs and as settings of ``generate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.protocol import ChatMessages
from torch import Tensor
from transformers import StoppingCriteria
from transformers.video_utils import VideoMetadata, load_video

from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.eval.samples import Asker
from vtprune.vlm_adapters._base import VLMAdapter

Messages = Sequence[Mapping[str, Any]]

MAX_NEW_TOKENS = 1024  # where a task names none
FRAMES = 32  # of a video, as lmms-eval's own models take by default
# lmms-eval adds this stop to every task that names none; chat models write paragraphs.
ADDED_STOP = "\n\n"
SAMPLING = ("temperature", "top_p", "top_k")
SETTINGS = {*SAMPLING, "max_new_tokens", "num_beams", "do_sample", "until", "repetition_penalty"}
# Settings of other models' code that tasks carry along, without a meaning here.
FOREIGN = {"image_aspect_ratio"}


class Prompter:
    """Turns conversations into left-padded inputs of one model."""

    def __init__(
        self, processor: Any, adapter: VLMAdapter, options: Mapping[str, Any] | None = None
    ) -> None:
        """Raises ConfigError where the processor has no chat template, or not such an option.

        Args:
            options: ``min_pixels``, ``max_pixels`` of an image, ``num_frames`` of a video at most.
        """
        Asker(processor)  # checks the template, and pads on the left
        self.processor, self.kinds = processor, [m.name for m in adapter.modalities]
        limits = dict(options or {})
        self._frames = limits.pop("num_frames", None)
        if self._frames is not None and "video" not in self.kinds:
            raise ConfigError(f"num_frames={self._frames}: the model takes no video. Leave it out.")
        self._images = _size(processor.image_processor, limits)

    def __call__(self, conversations: Sequence[Messages], blind: bool = False) -> dict[str, Tensor]:
        """Returns the inputs of a batch, on the CPU.

        Args:
            conversations: messages in lmms-eval's protocol, of which the last waits for an answer.
            blind: without images and videos.

        Raises:
            UnsupportedError: something is to be heard, or a video shown to a model that takes none.
            InputError: the processor does not take it.
        """
        checked = [self._checked(messages, blind) for messages in conversations]
        parts = [part for talk in checked for turn in talk for part in turn["content"]]
        videos = [part for part in parts if part["type"] == "video"]
        kwargs: dict[str, Any] = {"padding": True}
        if self._images and any(part["type"] == "image" for part in parts):
            kwargs["images_kwargs"] = dict(self._images)
        if videos:
            shown = [_load(part["video"], self._frames or FRAMES) for part in videos]
            for part, (frames, _) in zip(videos, shown, strict=True):
                part["video"] = frames
            about = [metadata for _, metadata in shown]
            kwargs["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": about}
        try:
            found = self.processor.apply_chat_template(
                checked,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=kwargs,
            )
        except (ValueError, TypeError) as error:
            made, reason = type(self.processor).__name__, str(error).partition("\n")[0]
            raise InputError(f"{made} cannot take a request: {reason}") from error
        return dict(found)

    def _checked(self, messages: Messages, blind: bool) -> list[dict[str, Any]]:
        talk = ChatMessages(messages=list(messages)).to_hf_messages()  # type: ignore[arg-type]
        for turn in talk:
            kinds = {part["type"] for part in turn["content"]}
            for kind in sorted(kinds - {"text", *self.kinds}):
                raise UnsupportedError(
                    f"A request holds {kind}, which this model does not take; it takes text, "
                    f"{', '.join(self.kinds)}. Choose other tasks, or another model."
                )
            if blind:
                turn["content"] = [part for part in turn["content"] if part["type"] == "text"]
        return talk

    def words(self, ids: Tensor) -> list[str]:
        """Returns the texts of ``[B, T]`` new ids."""
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def _size(part: Any, limits: Mapping[str, int]) -> dict[str, Any]:
    """Returns what makes an image processor keep to ``min_pixels`` and ``max_pixels``."""
    known = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    for name, value in limits.items():
        if name not in known:
            made = type(part).__name__
            raise ConfigError(f"{name}={value}: {made} does not take it. Leave it out.")
    if not limits:
        return {}
    least, most = part.size["shortest_edge"], part.size["longest_edge"]  # pixels, despite the names
    edges = limits.get("min_pixels", least), limits.get("max_pixels", most)
    return {"size": dict(zip(("shortest_edge", "longest_edge"), edges, strict=True))}


def _load(video: Any, n: int) -> tuple[Any, VideoMetadata]:
    """Returns ``n`` frames of a file, evenly spread, or all if it has less; ``[n, H, W, 3]``."""
    if not isinstance(video, str):
        raise UnsupportedError(
            f"A video is given as {type(video).__name__}; only files and addresses are read. "
            "Choose other tasks."
        )

    def spread(metadata: VideoMetadata, **_: Any) -> Any:
        last = metadata.total_num_frames - 1
        return torch.linspace(0, last, min(n, last + 1)).long().numpy()

    # lmms-eval brings this decoder; the processors' own may be missing.
    load: Any = load_video  # it says that it takes no paths
    return load(video, backend="pyav", sample_indices_fn=spread)


def group_of(wanted: Mapping[str, Any]) -> str:
    """Returns what is equal for requests that can be generated together."""
    return json.dumps(wanted, sort_keys=True, default=str)


def settings_for(wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments of ``generate``, and the texts at which an answer ends.

    Greedy, unless the task asks for samples. The stop that lmms-eval adds by itself, an empty
    line, is left out, as its own chat models do.

    Raises:
        UnsupportedError: the task wants a setting that is not known here.
    """
    unknown = sorted(wanted.keys() - SETTINGS - FOREIGN)
    if unknown:
        raise UnsupportedError(
            f"generation_kwargs {', '.join(unknown)} are not known; known are "
            f"{', '.join(sorted(SETTINGS))}. Copy the task without them, and give its folder."
        )
    until = wanted.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    found = {k: v for k, v in wanted.items() if k not in FOREIGN | {"until"} and v is not None}
    found.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    warm = found.get("temperature", 1) > 0
    found["do_sample"] = warm and found.get("do_sample", "temperature" in found)
    if not found["do_sample"]:  # said to be none, since the model's own settings may have some
        found |= dict.fromkeys(SAMPLING)
    return found, [stop for stop in stops if stop and stop != ADDED_STOP]


class Stops(StoppingCriteria):
    """Ends a row once its answer holds a stop.

    That of transformers reads the vocabulary, and fails where that cannot spell any word.
    """

    def __init__(
        self, stops: Sequence[str], start: int, words: Callable[[Tensor], list[str]]
    ) -> None:
        """Answers begin at ``start``; ``words`` makes texts of ids ``[B, T]``."""
        self.stops, self.start, self.words = stops, start, words

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.words(input_ids[:, self.start :])
        ended = [cut(text, self.stops) != text for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text up to the first of the stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
