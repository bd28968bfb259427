"""vLLM's own LLaVA, without the plug-in, answers to embeddings of images that were pruned here."""

from __future__ import annotations

from typing import Any

import pytest

import vtprune
from tests.serve import served
from tests.serve.served import agree, answer_here, answers, asked, request
from vtprune.eval import shipped
from vtprune.eval.samples import load_scenes
from vtprune.serve import to_vllm_inputs

KEEP = 32


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served") / "mini-llava"
    path = served.checkpoint(served.shipped_folder("mini-llava"), folder)
    return served.start(path, None, "", enable_mm_embeds=True)


@pytest.fixture(scope="module")
def here() -> tuple[Any, Any]:
    return shipped.load("mini-llava")


@pytest.mark.parametrize("strategy", ["fastervlm", "tome", "trim"])
def test_pruned_here_answered_there(engine: Any, here: Any, strategy: str) -> None:
    """By signals, by merging inside the tower, by the instruction: in one engine, in one batch."""
    model, processor = here
    scenes = load_scenes("scenes", "standard", None, 10, 14)
    prompts = [asked(processor, 1, scene.question) for scene in scenes]
    prompts.append(asked(processor, 2, scenes[0].question))
    images = [*([scene.image] for scene in scenes), [scenes[2].image, scenes[1].image]]
    with vtprune.wrap(
        *(model, strategy), keep=KEEP, positions="renumber", processor=processor
    ) as handle:
        made = to_vllm_inputs(handle, processor, prompts, images, uuids=True)
        wanted = [answer_here(model, processor, *one) for one in zip(prompts, images, strict=True)]
    agree(answers(engine, made.requests), wanted)
    again = answers(engine, made.requests)  # from the caches
    agree(again, wanted)
    assert all(answer.cached >= 32 for answer in again)


def test_one_image_and_two_questions_under_names(engine: Any, here: Any) -> None:
    """What a text-guided strategy keeps for one question is not taken for the other."""
    model, processor = here
    scene = load_scenes("scenes", "standard", None, 20, 21)[0]
    prompts = [asked(processor, 1, text) for text in ("which digit is red ?", scene.question)]
    options = {"keep": KEEP, "processor": processor}
    with vtprune.wrap(model, "trim", **options) as handle:
        made = to_vllm_inputs(handle, processor, prompts, [[scene.image]] * 2, uuids=True)
        wanted = [answer_here(model, processor, prompt, [scene.image]) for prompt in prompts]
    first, second = made.requests
    assert first["multi_modal_uuids"] != second["multi_modal_uuids"]
    for one, answer in zip(made.requests, wanted, strict=True):
        agree(answers(engine, [one]), [answer])


def test_whole_images_beside_embeddings(engine: Any, here: Any) -> None:
    model, processor = here
    scene = load_scenes("scenes", "standard", None, 30, 31)[0]
    prompt = asked(processor, 1, scene.question)
    agree(
        answers(engine, [request(processor, prompt, [scene.image])]),
        [answer_here(model, processor, prompt, [scene.image])],
    )
