"""Seeded images and videos, and batches of them through a family's real processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Conversation = list[dict[str, Any]]

_VIDEO = {
    "internvl",
    "llava_next_video",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llava",
}
# To these a video is one thing with frames; to others frames are images.
VIDEOS = sorted(_VIDEO - {"internvl", "smolvlm"})


def kinds(family: str) -> list[str]:
    """Returns the batch kinds that this family's processor and model can take."""
    if family == "smolvlm":  # Its processor lets the video's pixels replace those of the images.
        return [kind for kind in _KINDS if kind != "video_and_image"]
    return [kind for kind in _KINDS if family in _VIDEO or "video" not in kind]


def image(seed: int, width: int, height: int) -> Image.Image:
    """Returns a picture of smooth colours with some noise on it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = rng.integers(-20, 21, smooth.shape, dtype=np.int16)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def video(seed: int, width: int, height: int, n_frames: int = 5) -> np.ndarray:
    """Returns uint8 ``[n_frames, height, width, 3]``: a window that slides over a picture."""
    wide = np.asarray(image(seed, width + 4 * n_frames, height))
    return np.stack([wide[:, 4 * i : 4 * i + width] for i in range(n_frames)])


def user(*content: str | Image.Image | np.ndarray) -> Conversation:
    """Returns a conversation of one message."""
    return [{"role": "user", "content": [_part(part) for part in content]}]


def _part(content: str | Image.Image | np.ndarray) -> dict[str, Any]:
    if isinstance(content, str):
        return {"type": "text", "text": content}
    kind = "image" if isinstance(content, Image.Image) else "video"
    return {"type": kind, kind: content}


def _one(seed: int) -> list[Conversation]:
    return [user(image(seed, 120, 90), "What is in the picture?")]


def _ragged(seed: int) -> list[Conversation]:
    """Two rows of different lengths, with one and two images, none of them square."""
    first = user(image(seed, 60, 84), "Which colour has the large ball in this image?")
    second = user(image(seed + 1, 100, 36), "and", image(seed + 2, 44, 52), "Describe.")
    return [first, second]


def _mixed(seed: int) -> list[Conversation]:
    """A row without image beside one with an image."""
    return [user("How many colours are there?"), user(image(seed, 70, 50), "Is it green?")]


def _video(seed: int) -> list[Conversation]:
    return [user(video(seed, 56, 40), "What happens in the video?")]


def _video_and_image(seed: int) -> list[Conversation]:
    """An image, a video and another image in one row."""
    return [
        user(
            image(seed, 48, 66),
            "What is this, and",
            video(seed, 56, 40),
            "what happens here?",
            image(seed + 1, 40, 30),
            "Describe both.",
        )
    ]


_KINDS: dict[str, Callable[[int], list[Conversation]]] = {
    "one": _one,
    "ragged": _ragged,
    "mixed": _mixed,
    "video": _video,
    "video_and_image": _video_and_image,
}


def inputs(processor: Any, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Returns the left-padded batch that ``processor`` makes of the conversations of ``kind``."""
    return encode(processor, _KINDS[kind](seed))


def encode(processor: Any, conversations: list[Conversation]) -> dict[str, Tensor]:
    """Returns the left-padded batch of these conversations."""
    return dict(
        processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
    )
