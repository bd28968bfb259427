"""mini-llava, pruned inside the engine, and embeddings of any counts beside it."""

from __future__ import annotations

from typing import Any

import pytest

import vtprune
from tests.serve import served
from tests.serve.served import agree, answer_embedded, answer_here, answers, asked, request
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import shipped
from vtprune.eval.samples import load_scenes
from vtprune.registry import keeping_names
from vtprune.serve import to_vllm_inputs
from vtprune.serve.towers import LlavaTower

KEEP = 32
# Merging in the tower's output, with [CLS] as a source: all that the hooks do.
SETTING = {"strategy": "visionzip", "keep": KEEP}
MUST = {"divprune", "fastervlm", "hiprune", "random", "strided", "visionzip", "vispruner"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served") / "mini-llava"
    path = served.checkpoint(served.shipped_folder("mini-llava"), folder)
    return served.start(path, SETTING, "VtpruneLlava", enable_mm_embeds=True)


@pytest.fixture(scope="module")
def here() -> tuple[Any, Any]:
    return shipped.load("mini-llava")


@pytest.fixture(scope="module")
def prompts(here: tuple[Any, Any]) -> list[tuple[str, list[Any]]]:
    """Five with an image of their own, and one with two."""
    scenes = load_scenes("scenes", "standard", None, 0, 7)
    each = [(asked(here[1], 1, s.question), [s.image]) for s in scenes[:5]]
    two = (asked(here[1], 2, scenes[5].question), [scenes[5].image, scenes[6].image])
    return [*each, two]


@pytest.fixture(scope="module")
def wanted(here: tuple[Any, Any], prompts: Any) -> list[served.Answer]:
    model, processor = here
    with vtprune.wrap(model, "visionzip", keep=KEEP, positions="renumber"):
        return [answer_here(model, processor, *one) for one in prompts]


def test_a_batch_of_mixed_images(engine: Any, here: Any, prompts: Any, wanted: Any) -> None:
    found = answers(engine, [request(here[1], *one) for one in prompts])
    agree(found, wanted)
    text = [len(here[1].tokenizer(prompt)["input_ids"]) for prompt, _ in prompts]
    images = [len(images) for _, images in prompts]
    assert [answer.prompt for answer in found] == [
        n + (KEEP - 1) * i for n, i in zip(text, images, strict=True)
    ]


def test_again_from_the_prefix_cache(engine: Any, here: Any, prompts: Any, wanted: Any) -> None:
    found = answers(engine, [request(here[1], *one) for one in prompts])
    assert all(answer.cached >= 32 for answer in found)
    agree(found, wanted)


def test_the_text_is_tokenized_by_the_engine(engine: Any, prompts: Any, wanted: Any) -> None:
    prompt, (image,) = prompts[0]
    given = {"prompt": prompt.removeprefix("<s> "), "multi_modal_data": {"image": image}}
    (found,) = answers(engine, [{**given, "prompt": prompt}])
    agree([found], wanted[:1])


def test_embeddings_of_any_counts(engine: Any, here: Any, prompts: Any) -> None:
    model, processor = here
    given = []
    for (prompt, images), keep in zip(prompts, (9, 16, 64), strict=False):
        made = to_vllm_inputs(model, processor, [prompt], [images], strategy="divprune", keep=keep)
        given += made.requests
    a, b = (one["multi_modal_data"]["image"][0] for one in given[:2])
    ids = processor.tokenizer(prompts[-1][0])["input_ids"]
    given.append({"prompt_token_ids": ids, "multi_modal_data": {"image": [b + 1e-3, a + 1e-3]}})
    found = answers(engine, given)
    assert [answer.cached for answer in found] == [0] * 4  # nothing was seen before
    agree(found, [answer_embedded(model, one) for one in given])


def test_every_strategy_that_is_served_chooses_the_same(
    engine: Any, here: Any, prompts: Any
) -> None:
    model, processor = here
    images = [image for _, own in prompts for image in own]
    inputs = processor(text=["<image>"] * len(images), images=images, return_tensors="pt")

    def see(served_model: Any) -> Any:
        pixels = served_model._parse_and_validate_image_input(pixel_values=inputs["pixel_values"])
        return served_model._process_image_input(pixels)

    differ: dict[str, float] = {}
    for name in keeping_names():
        setting = {"strategy": name, "keep": KEEP, "positions": "renumber"}
        try:
            found = served.rows_of(engine, LlavaTower, setting, see)
        except (ConfigError, UnsupportedError):
            continue
        options = {"keep": KEEP, "positions": "renumber"}
        differ[name], _ = served.furthest(model, name, options, inputs, found)
    assert {name for name, far in differ.items() if far <= 1e-4} >= MUST
    assert {name: far for name, far in differ.items() if far > 1e-4} == {}
