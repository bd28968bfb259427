"""Held-out scenes as samples, and samples as model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval import scenes

DATA = "scenes/test"
MAX_NEW_TOKENS = 4  # answers are one word


@dataclass(frozen=True)
class Sample:
    """Number ``index`` of the data: an image, a question, and the single-word answer expected."""

    index: int
    task: str
    image: Image.Image
    question: str
    expected: str


def load_samples(first: int, end: int) -> list[Sample]:
    """Returns the held-out samples ``first`` to ``end - 1``."""
    made = []
    for index in range(first, end):
        scene = scenes.make_scene(index, "test")
        asked = scenes.pick_question(scene, index)
        made.append(Sample(index, asked.task, scene.image, asked.text, asked.answer))
    return made


class Asker:
    """Turns questions into inputs of one model and its output into words."""

    def __init__(self, processor: Any) -> None:
        """Raises ConfigError when the processor has no chat template."""
        if not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"The processor ({type(processor).__name__}) has no chat template, so questions "
                "cannot be put as the model was trained. Add chat_template.jinja to its directory."
            )
        processor.tokenizer.padding_side = "left"
        self.processor = processor

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
        """Returns the first word of each row's greedy answer; waits for the device."""
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.first_words(ids[:, inputs["input_ids"].shape[1] :].cpu())

    def first_words(self, new_ids: torch.Tensor) -> list[str]:
        """Returns the first word of each row of ``[B, T]`` new ids, without punctuation."""
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        return [(text.lower().split() or [""])[0].strip(".,;:!?\"'") for text in texts]

    def _prompt(self, question: str, with_image: bool) -> str:
        image = [{"type": "image"}] if with_image else []
        message = {"role": "user", "content": [*image, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)
