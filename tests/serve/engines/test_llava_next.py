"""A LLaVA-NeXT of random weights, pruned inside the engine: tiles, newlines, images of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import vtprune
from tests.families.prompts import image
from tests.serve import served
from tests.serve.served import agree, answer_embedded, answer_here, answers, request
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval.tiny._weights import random_model
from vtprune.eval.tiny.anyres import llava_next
from vtprune.registry import keeping_names
from vtprune.serve import to_vllm_inputs
from vtprune.serve.towers import LlavaNextTower

KEEP = 12
MUST = {"divprune", "fastervlm", "hiprune", "random", "strided", "visionzip", "vispruner"}
SIZES = ((28, 28), (60, 28), (30, 90), (56, 56), (57, 41))  # width, height
PROMPT = "user : <image> what color is the star ? assistant :"
TWO = "user : <image> and then <image> which of these two is red , please ? assistant :"


@pytest.fixture(scope="module")
def here() -> tuple[Any, Any]:
    """Wide enough for the engine's attention, whose heads have at least 32 numbers."""
    cls, config, processor = llava_next()
    text = config.text_config.to_dict() | {"hidden_size": 128, "head_dim": 32}
    config.text_config = LlamaConfig(**text)
    model = random_model(cls, config, "sdpa", 0).eval()
    barred = [i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special]
    with torch.no_grad():  # a placeholder that is generated would ask for an image
        model.lm_head.weight[barred] = 0
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.fixture(scope="module")
def engine(here: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served")
    for part in here:
        part.save_pretrained(folder / "saved")
    path = served.checkpoint(folder / "saved", folder / "renamed")
    setting = {"strategy": "fastervlm", "keep": KEEP}
    return served.start(path, setting, "VtpruneLlavaNext", enable_mm_embeds=True)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[str, list[Any]]]:
    each = [image(seed, *size) for seed, size in enumerate(SIZES)]
    return [*((PROMPT, [one]) for one in each), (TWO, [each[2], each[4]])]


def test_images_of_many_sizes(engine: Any, here: Any, prompts: Any) -> None:
    model, processor = here
    with vtprune.wrap(model, "fastervlm", keep=KEEP, positions="renumber"):
        wanted = [answer_here(model, processor, *one) for one in prompts]
    found = answers(engine, [request(processor, *one) for one in prompts])
    agree(found, wanted)
    assert len({answer.prompt for answer in found}) > 2  # newlines
    again = answers(engine, [request(processor, *one) for one in prompts])
    assert again[-1].cached >= 32
    agree(again, wanted)


def test_embeddings_of_any_counts(engine: Any, here: Any, prompts: Any) -> None:
    model, processor = here
    texts, images = zip(*prompts, strict=True)
    options = {"strategy": "trim", "keep": 0.4, "ragged": True}
    made = to_vllm_inputs(model, processor, texts, images, **options)
    found = answers(engine, made.requests)
    agree(found, [answer_embedded(model, one) for one in made.requests])


def test_every_strategy_that_is_served_chooses_the_same(
    engine: Any, here: Any, prompts: Any
) -> None:
    model, processor = here
    images = [one for _, own in prompts[:5] for one in own]
    marks = " ".join(["<image>"] * len(images))
    inputs = processor(text=[marks], images=images, return_tensors="pt")

    def see(served_model: Any) -> Any:
        pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        given = served_model._parse_and_validate_image_input(**pixels)
        return served_model._process_image_input(given)

    differ = {}
    for name in keeping_names():
        setting = {"strategy": name, "keep": KEEP, "positions": "renumber"}
        try:
            found = served.rows_of(engine, LlavaNextTower, setting, see)
        except (ConfigError, UnsupportedError):
            continue
        options = {"keep": KEEP, "positions": "renumber"}
        differ[name], _ = served.furthest(model, name, options, inputs, found)
    assert {name for name, far in differ.items() if far <= 1e-4} >= MUST
    assert {name: far for name, far in differ.items() if far > 1e-4} == {}
