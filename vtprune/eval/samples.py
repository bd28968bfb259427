"""Tasks: held-out samples by name, and samples as model inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import clip_questions, clips, scenes
from vtprune.eval.scene_questions import KINDS
from vtprune.registry import unknown

DEFAULT, CLIPS = "scenes", "clips"
LMMS = "lmms:"  # begins tasks that lmms-eval asks
# Width and height in pixels; five sizes and seven kinds of question meet in every way.
SIZES = ((96, 96), (128, 96), (104, 152), (160, 128), (176, 176))
MAX_NEW_TOKENS = 5  # answers are one word, or a number of up to four digits


@dataclass(frozen=True)
class Video:
    """``frames`` ``[F, H, W, 3]`` uint8, ``fps`` of them a second."""

    frames: NDArray[np.uint8]
    fps: float

    def about(self) -> dict[str, Any]:
        """Returns what a processor is told, so that it takes all frames at their times."""
        n = len(self.frames)
        return {"fps": self.fps, "total_num_frames": n, "frames_indices": list(range(n))}


@dataclass(frozen=True)
class Sample:
    """Number ``index`` of ``task``: what is seen, a question of some kind, the answer expected."""

    task: str
    index: int
    kind: str
    seen: Image.Image | Video
    question: str
    expected: str

    @property
    def image(self) -> Image.Image:
        """What is seen.

        Raises:
            UnsupportedError: it is a video.
        """
        if isinstance(self.seen, Video):
            raise UnsupportedError(f"Sample {self.index} of {self.task} is a video, not an image.")
        return self.seen


@dataclass(frozen=True)
class Task:
    """Samples that are scored together; ``load(first, end)`` returns ``first`` to ``end - 1``.

    All of them are images, or all ``videos``; those of a benchmark elsewhere may be any.
    """

    name: str
    what: str
    load: Callable[[int, int], list[Sample]]
    videos: bool = field(default=False, kw_only=True)


def load_scenes(task: str, level: str, kind: str | None, first: int, end: int) -> list[Sample]:
    """Returns samples of held-out scenes of a level; one kind of question, or all in turn."""
    made = []
    for index in range(first, end):
        scene = scenes.make_scene(index, "test", level)
        asked = scenes.pick_question(scene, index, kind)
        made.append(Sample(task, index, asked.kind, scene.image, asked.text, asked.answer))
    return made


def load_sizes(task: str, first: int, end: int) -> list[Sample]:
    """Returns the samples of the default task, their images at ``SIZES`` in turn."""
    made = load_scenes(task, "standard", None, first, end)
    return [replace(s, seen=s.image.resize(SIZES[s.index % len(SIZES)])) for s in made]


def load_clips(task: str, kind: str | None, first: int, end: int) -> list[Sample]:
    """Returns samples of held-out clips; one kind of question, or all in turn."""
    made = []
    for index in range(first, end):
        clip = clips.make_clip(index, "test")
        asked = clips.pick_question(clip, index, kind)
        video = Video(clip.frames, clips.FPS)
        made.append(Sample(task, index, asked.kind, video, asked.text, asked.answer))
    return made


def _scenes(name: str, what: str, level: str = "standard", kind: str | None = None) -> Task:
    return Task(name, what, partial(load_scenes, name, level, kind))


def _clips(name: str, what: str, kind: str | None = None) -> Task:
    return Task(name, what, partial(load_clips, name, kind), videos=True)


_ALL = (
    _scenes(DEFAULT, f"held-out scenes, all kinds of question in turn: {', '.join(KINDS)}"),
    *(
        _scenes(f"{DEFAULT}-{level}", f"the same, {level} scenes", level=level)
        for level in scenes.LEVELS
        if level != "standard"
    ),
    *(_scenes(f"{DEFAULT}-{kind}", f"held-out scenes, {kind} alone", kind=kind) for kind in KINDS),
    Task(
        f"{DEFAULT}-sizes",
        "held-out scenes, resized to " + ", ".join(f"{w}x{h}" for w, h in SIZES) + " in turn",
        partial(load_sizes, f"{DEFAULT}-sizes"),
    ),
    _clips(CLIPS, f"held-out clips, all kinds in turn: {', '.join(clip_questions.KINDS)}"),
    *(
        _clips(f"{CLIPS}-{kind}", f"held-out clips, {kind} alone", kind)
        for kind in clip_questions.KINDS
    ),
)
TASKS = {task.name: task for task in _ALL}


def find_tasks(names: Sequence[str], known: Mapping[str, Task] = TASKS) -> list[Task]:
    """Returns the tasks of these names, of those that are ``known``.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    if not names:
        raise ConfigError(f"No task was given. Known: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise unknown("task", name, known)
    return [known[name] for name in names]


class Asker:
    """Turns questions into inputs of one model and its output into answers."""

    def __init__(self, processor: Any, hint: str = "") -> None:
        """Raises ConfigError when the processor has no chat template.

        ``hint`` comes after every question, such as "Answer with one word."
        """
        if not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"The processor ({type(processor).__name__}) has no chat template, so questions "
                "cannot be put as the model was trained. Add chat_template.jinja to its directory."
            )
        processor.tokenizer.padding_side = "left"
        self.processor, self.hint = processor, hint

    def __call__(
        self, questions: Sequence[str], seen: Sequence[Image.Image | Video] | None
    ) -> dict[str, torch.Tensor]:
        """Returns left-padded inputs, one question per row; without what is seen text alone.

        Args:
            seen: images, or videos.

        Raises:
            UnsupportedError: videos, and a processor or a chat template without any.
        """
        videos = [what for what in seen or () if isinstance(what, Video)]
        kind = None if seen is None else "video" if videos else "image"
        prompts = [self._prompt(question, kind) for question in questions]
        kwargs = {"images": list(seen)} if seen is not None and not videos else {}
        if videos:
            self.check_videos()
            options = {"do_sample_frames": False, "video_metadata": [v.about() for v in videos]}
            kwargs = {"videos": [video.frames for video in videos], "videos_kwargs": options}
        return dict(self.processor(text=prompts, return_tensors="pt", padding=True, **kwargs))

    def check_videos(self) -> None:
        """Raises UnsupportedError where the processor or its chat template takes no videos."""
        marker = getattr(self.processor, "video_token", None)
        if marker is None or marker not in self._prompt("?", "video"):
            raise UnsupportedError(
                f"The processor ({type(self.processor).__name__}) or its chat template takes no "
                "videos. Use a model that does, such as 'mini-video', or a task with images."
            )

    def answers(
        self, model: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int
    ) -> list[str]:
        """Returns each row's greedy answer, as ``answer_of`` reads it; waits for the device."""
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_ids = ids[:, inputs["input_ids"].shape[1] :].cpu()
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        return [answer_of(text) for text in texts]

    def tail(self, question: str) -> str:
        """Returns what comes after the image in the prompt with this question."""
        return self._prompt(question, "image").rpartition(self.processor.image_token)[2]

    def _prompt(self, question: str, kind: str | None) -> str:
        image = [] if kind is None else [{"type": kind}]
        text = f"{question} {self.hint}".strip()
        message = {"role": "user", "content": [*image, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)


def answer_of(text: str) -> str:
    """Returns the first word in lower case without punctuation; "3 7 1" is the number 371."""
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "", text.lower())
    return (re.findall(r"\w+", joined) or [""])[0]
