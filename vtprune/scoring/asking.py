"""Frames scored by a small vision-language model, which is asked whether each shows what matters.

As QuoTA does it: arXiv 2503.08689. Prompts are worded anew, close in meaning.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InputError, UnsupportedError

YES = "A"
CHOICE = "A. yes, B. no\nAnswer with the letter of the option alone."
STEPS = """A question about a video is given. Work through three steps and write one line for each.
Step 1: Do physical things have to be found in the video to answer it? Write yes or no.
Step 2: If so, list all things that the question is about, as ["...", "..."]; otherwise [].
Step 3: Of that list keep only what a camera can see, things, animals and people, as a list again.

Question: What colour is the kite that the boy flies in the end?
Step 1: yes
Step 2: ["kite", "boy", "colour", "end"]
Step 3: ["kite", "boy"]

Question: What is the video mainly about?
Step 1: no
Step 2: []
Step 3: []

Question: How often does the cat jump onto the table before the door opens?
Step 1: yes
Step 2: ["cat", "jump", "table", "door"]
Step 3: ["cat", "table", "door"]

Question: {question}
"""


def objects_in(answer: str) -> list[str]:
    """Returns the things that an answer to ``STEPS`` lists, in lower case; none where it says so.

    What is no list of texts counts as none.
    """
    text = answer.lower()
    needed = re.search(r"step 1:\s*(yes|no)\b", text)
    listed = re.search(r"step 3:\s*(\[[^\]]*\])", text)
    if needed is None or needed[1] == "no" or listed is None:
        return []
    try:
        found = ast.literal_eval(listed[1])
    except (SyntaxError, ValueError):
        return []
    return [thing.strip() for thing in found if isinstance(thing, str) and thing.strip()]


def asked(question: str, objects: Sequence[str]) -> str:
    """Returns what is asked of one frame."""
    if objects:
        return f"Does the image show any of {{{', '.join(objects)}}}? {CHOICE}"
    return f"{question}\nDoes the image hold enough to answer that question? {CHOICE}"


class Judge:
    """Scores frames by how sure a vision-language model is that they matter to a question.

    A call runs the model once per frame, so give it a small one, and keep what it returns.

    Args:
        model: a Hugging Face vision-language model that takes images; ``processor``: its own, with
            a chat template.
        at_once: frames per batch.

    Raises:
        UnsupportedError: the processor has no chat template, or no single token for the letter.
    """

    def __init__(self, model: Any, processor: Any, at_once: int = 8) -> None:
        if not getattr(processor, "chat_template", None):
            raise UnsupportedError(
                f"{type(processor).__name__} has no chat template, so the model cannot be asked. "
                "Give an instruction-tuned model with its processor."
            )
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise InputError(f"at_once={at_once!r} must be a count of frames of at least 1.")
        ids = processor.tokenizer.encode(YES, add_special_tokens=False)
        if len(ids) != 1:
            raise UnsupportedError(
                f"{type(processor.tokenizer).__name__} makes {len(ids)} tokens of the answer "
                f"{YES!r}; give a model for which it is one."
            )
        self.model, self.processor, self.at_once, self.yes = model, processor, at_once, ids[0]

    @torch.no_grad()
    def __call__(self, frames: Sequence[Any], question: str, objects: Sequence[str] = ()) -> Tensor:
        """Returns the probability of yes of each frame, ``[T]`` float32.

        Args:
            frames: pictures, or arrays ``[H, W, 3]`` uint8, as the processor takes images.
            objects: what to look for instead of an answer to ``question``; see ``objects``.

        Raises:
            InputError: there is no frame.
        """
        if not len(frames):
            raise InputError("There is no frame to score; give at least one.")
        text = asked(question, objects)
        found = []
        for first in range(0, len(frames), self.at_once):
            batch = [self._user(text, frame) for frame in frames[first : first + self.at_once]]
            logits = self.model(**self._inputs(batch), logits_to_keep=1).logits[:, -1]
            found.append(logits.float().softmax(-1)[:, self.yes])
        return torch.cat(found)

    @torch.no_grad()
    def objects(self, question: str, max_new_tokens: int = 512) -> list[str]:
        """Asks the model, without a picture, what a question is about; returns things to look for.

        Empty where the question is about no such thing, or the answer cannot be read.
        """
        inputs = self._inputs([self._user(STEPS.format(question=question))])
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return objects_in(self.processor.tokenizer.decode(new, skip_special_tokens=True))

    def _user(self, text: str, frame: Any = None) -> list[dict[str, Any]]:
        picture = [] if frame is None else [{"type": "image", "image": frame}]
        return [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]

    def _inputs(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Returns the left-padded batch of these conversations on the model's device."""
        made = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return {name: value.to(self.model.device) for name, value in made.items()}
