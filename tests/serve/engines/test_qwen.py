"""mini-qwen, pruned inside the engine; prompts are prefilled in pieces that end inside images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.serve import served
from tests.serve.served import agree, answer_here, answers, asked, request
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import shipped
from vtprune.eval.samples import load_sizes
from vtprune.registry import keeping_names
from vtprune.serve.mrope import CHANNELS
from vtprune.serve.towers import QwenTower

KEEP = 0.25
MUST = {"divprune", "fastervlm", "hiprune", "random", "strided", "visionzip"}
TOKENS_A_STEP = 48


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served") / "mini-qwen"
    path = served.checkpoint(served.shipped_folder("mini-qwen"), folder)
    setting = {"strategy": "hiprune", "keep": KEEP}
    pieces = {"max_num_batched_tokens": TOKENS_A_STEP, "max_num_seqs": 4}
    options = {**pieces, "enable_chunked_prefill": True, "skip_mm_profiling": True}
    options["mm_device_do_normalize"] = False  # a test below gives the tower what a processor makes
    return served.start(path, setting, "VtpruneQwen2_5_VL", **options)


@pytest.fixture(scope="module")
def here() -> tuple[Any, Any]:
    return shipped.load("mini-qwen")


@pytest.fixture(scope="module")
def prompts(here: tuple[Any, Any]) -> list[tuple[str, list[Any]]]:
    """Square, landscape and portrait images, each asked about by itself and then two at once."""
    samples = load_sizes("scenes", 0, 5)
    each = [(asked(here[1], 1, s.question), [s.image]) for s in samples]
    two = (asked(here[1], 2, samples[0].question), [samples[2].image, samples[1].image])
    return [*each, two]


@pytest.fixture(scope="module")
def wanted(here: tuple[Any, Any], prompts: Any) -> list[served.Answer]:
    model, processor = here
    with vtprune.wrap(model, "hiprune", keep=KEEP):
        return [answer_here(model, processor, *one) for one in prompts]


def test_images_of_many_shapes(engine: Any, here: Any, prompts: Any, wanted: Any) -> None:
    found = answers(engine, [request(here[1], *one) for one in prompts])
    agree(found, wanted)
    assert max(answer.prompt for answer in found) > 2 * TOKENS_A_STEP


def test_again_from_the_prefix_cache(engine: Any, here: Any, prompts: Any, wanted: Any) -> None:
    found = answers(engine, [request(here[1], *one) for one in prompts])
    assert all(answer.cached >= 32 for answer in found)
    agree(found, wanted)


def test_a_placeholder_in_the_text_stands_for_no_image(
    engine: Any, here: Any, prompts: Any
) -> None:
    """Written after an image, it is a word like others; its row is that of the vocabulary."""
    model, processor = here
    prompt, images = prompts[2]
    ids = processor.tokenizer(prompt)["input_ids"]
    marker, end = model.config.image_token_id, len(ids) - 3
    strayed = [*ids[:end], marker, marker, *ids[end:]]
    plain = [*ids[:end], ids[end], ids[end], *ids[end:]]
    for some in (strayed, plain):
        assert engine.reset_prefix_cache()
        given = {"prompt_token_ids": some, "multi_modal_data": {"image": images}}
        first, second = (answers(engine, [given])[0] for _ in range(2))
        assert second.cached > first.cached
        agree([second], [first])


def test_every_strategy_that_is_served_chooses_the_same(
    engine: Any, here: Any, prompts: Any
) -> None:
    model, processor = here
    images = [image for _, own in prompts[:5] for image in own]
    prompt = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor(text=[prompt * len(images)], images=images, return_tensors="pt")

    def see(served_model: Any) -> Any:
        pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        return served_model.embed_multimodal(**pixels)

    columns = (inputs["image_grid_thw"][:, 2] // 2).tolist()
    differ, elsewhere = {}, []
    for name in keeping_names():
        try:
            found = served.rows_of(engine, QwenTower, {"strategy": name, "keep": KEEP}, see)
        except (ConfigError, UnsupportedError):
            continue
        rows = [image[:, :-CHANNELS] for image in found]
        differ[name], chosen = served.furthest(model, name, {"keep": KEEP}, inputs, rows)
        for image, selection, width in zip(found, chosen, columns, strict=True):
            digits = image[:, -CHANNELS:].long()
            place = (digits[:, 0] * 256 + digits[:, 1]) * width + digits[:, 2] * 256 + digits[:, 3]
            if selection is not None and not torch.equal(place, selection.slots[0]):
                elsewhere.append(name)
    assert {name for name, far in differ.items() if far <= 1e-4} >= MUST
    assert {name: far for name, far in differ.items() if far > 1e-4} == {}
    assert elsewhere == []
