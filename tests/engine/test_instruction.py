"""Which words of a prompt are the instruction, by real processors of the families and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from vtprune.engine.inputs import visual
from vtprune.engine.instruction import instructions
from vtprune.engine.plan import find_adapter
from vtprune.eval import shipped, tiny

WORDS = {3: "user", 4: ":", 5: "which", 6: "one", 7: "?", 8: "ASSIST", 9: "ANT:", 10: "\n"}
IMAGE = 2


class Plain:
    """A processor without a chat template; 0 and 1 are special."""

    class tokenizer:
        all_special_ids = (0, 1)
        all_special_tokens = ("<pad>", "<end>")

        @staticmethod
        def decode(ids: list[int]) -> str:
            return "".join(WORDS.get(i, "<end>") for i in ids)


class Templated(Plain):
    chat_template = "as apply_chat_template does it"
    behind = " ASSISTANT:"

    @classmethod
    def apply_chat_template(cls, messages: Any, *, add_generation_prompt: bool) -> str:
        (message,) = messages
        return f"user:{message['content'][0]['text']}{cls.behind}"


class Ended(Templated):
    behind = "<end>\nASSISTANT:"


def found(prompt: list[int], processor: Any) -> list[int]:
    ids = torch.tensor([[0, *prompt]])
    (words,) = instructions(ids, ids != 0, ids == IMAGE, processor)
    return words.tolist()


@pytest.mark.parametrize(
    ("prompt", "processor", "wanted"),
    [
        ([3, 4, 2, 2, 5, 6, 7], Plain, [5, 6, 7]),
        ([3, 4, 2, 5, 2, 6, 7], Plain, [6, 7]),  # after the last image
        ([3, 4, 5, 6, 7, 2], Plain, [3, 4, 5, 6, 7]),  # nothing after it: all words
        ([3, 4, 2, 5, 6, 7, 8, 9], Plain, [5, 6, 7, 8, 9]),  # no template: nothing is known of it
        ([3, 4, 2, 5, 6, 7, 8, 9], Templated, [5, 6, 7]),
        ([3, 4, 2, 5, 6, 7], Templated, [5, 6, 7]),  # the prompt was not closed
        ([3, 4, 2, 5, 6, 9], Templated, [5, 6, 9]),  # half of it is not it
        ([3, 4, 5, 6, 2, 8, 9], Templated, [3, 4, 5, 6]),  # no word after the image but the closing
        ([3, 4, 2, 5, 6, 7, 1, 10, 8, 9], Ended, [5, 6, 7]),
    ],
)
def test_by_hand(prompt, processor, wanted):
    assert found(prompt, processor) == wanted


QUESTION = "what color is the circle ?"


@pytest.mark.parametrize("name", shipped.vlm_names())
def test_shipped_models_ask_nothing_but_the_question(name):
    model, processor = shipped.load(name, "cpu", "float32")
    assert asked(model, processor) == QUESTION


@pytest.mark.parametrize("family", tiny.names())
def test_every_family_asks_nothing_but_the_question(family):
    assert asked(*tiny.build(family)) == QUESTION


def asked(model: Any, processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    ids = inputs["input_ids"]
    images = visual(find_adapter(model), ids)
    (words,) = instructions(ids, inputs["attention_mask"].bool(), images, processor)
    return processor.tokenizer.decode(words.tolist()).strip()
