"""Tasks: held-out samples by name, and samples as model inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval import scenes
from vtprune.eval.scene_questions import KINDS
from vtprune.registry import unknown

DEFAULT = "scenes"
LMMS = "lmms:"  # begins tasks that lmms-eval asks
# Width and height in pixels; five sizes and seven kinds of question meet in every way.
SIZES = ((96, 96), (128, 96), (104, 152), (160, 128), (176, 176))
MAX_NEW_TOKENS = 5  # answers are one word, or a number of up to four digits


@dataclass(frozen=True)
class Sample:
    """Number ``index`` of ``task``: an image, a question of some kind, the answer expected."""

    task: str
    index: int
    kind: str
    image: Image.Image
    question: str
    expected: str


@dataclass(frozen=True)
class Task:
    """Samples that are scored together; ``load(first, end)`` returns ``first`` to ``end - 1``."""

    name: str
    what: str
    load: Callable[[int, int], list[Sample]]


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
    return [replace(s, image=s.image.resize(SIZES[s.index % len(SIZES)])) for s in made]


def _scenes(name: str, what: str, level: str = "standard", kind: str | None = None) -> Task:
    return Task(name, what, partial(load_scenes, name, level, kind))


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
        self, questions: Sequence[str], images: Sequence[Image.Image] | None
    ) -> dict[str, torch.Tensor]:
        """Returns left-padded inputs, one question per row; without ``images`` text alone."""
        prompts = [self._prompt(question, images is not None) for question in questions]
        kwargs = {} if images is None else {"images": list(images)}
        return dict(self.processor(text=prompts, return_tensors="pt", padding=True, **kwargs))

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
        return self._prompt(question, True).rpartition(self.processor.image_token)[2]

    def _prompt(self, question: str, with_image: bool) -> str:
        image = [{"type": "image"}] if with_image else []
        text = f"{question} {self.hint}".strip()
        message = {"role": "user", "content": [*image, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)


def answer_of(text: str) -> str:
    """Returns the first word in lower case without punctuation; "3 7 1" is the number 371."""
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "", text.lower())
    return (re.findall(r"\w+", joined) or [""])[0]
