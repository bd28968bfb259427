"""Embeddings in place of images: what transformers makes of them, what is refused, and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.families.prompts import image
from tests.serve.served import agree, answer_embedded, answer_here
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.eval import tiny
from vtprune.serve import to_vllm_inputs

FAMILIES = ("llava", "llava_next", "llava_onevision")
PROMPT = "user : <image> what color is the star ? assistant :"
TWO = "user : <image> and <image> which is red ? assistant :"


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    return {family: tiny.build(family) for family in (*FAMILIES, "qwen2_5_vl", "video_llava")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["fastervlm", "trim"])
def test_embeddings_say_what_the_pruned_images_say(loaded: Any, family: str, strategy: str) -> None:
    model, processor = loaded[family]
    pictures = [[image(0, 40, 70)], [image(1, 60, 60), image(2, 90, 30)]]
    made = to_vllm_inputs(
        *(model, processor, [PROMPT, TWO], pictures),
        **{"strategy": strategy, "keep": 7, "positions": "renumber", "ragged": True},
    )
    options: Any = {"keep": 7, "positions": "renumber", "processor": processor}
    cases = zip((PROMPT, TWO), pictures, made.requests, made.kept(), strict=True)
    for prompt, own, request, kept in cases:
        with vtprune.wrap(model, strategy, **options) as handle:
            wanted = answer_here(model, processor, prompt, own)
        agree([answer_embedded(model, request)], [wanted])
        assert request["prompt_token_ids"].count(model.config.image_token_id) == len(own)
        assert kept == [chosen.slots[0].tolist() for chosen in handle.selections]
        assert [len(x) for x in request["multi_modal_data"]["image"]] == list(map(len, kept))
    newlines = family != "llava"
    assert (len(made.kept()[0][0]) > 7) == newlines


def test_a_wrapped_model_or_its_handle_is_taken_as_it_is(loaded: Any) -> None:
    model, processor = loaded["llava"]
    given: Any = processor, [PROMPT], [[image(0, 42, 42)]]
    fresh = to_vllm_inputs(model, *given, strategy="divprune", keep=5)
    with vtprune.wrap(model, "divprune", keep=5) as handle:
        for one in (model, handle):
            assert to_vllm_inputs(one, *given).kept() == fresh.kept()
        with pytest.raises(ConfigError, match="strategy, keep: the model is wrapped already"):
            to_vllm_inputs(model, *given, strategy="divprune", keep=5)
    with pytest.raises(ConfigError, match="not wrapped; give strategy"):
        to_vllm_inputs(model, *given)


def test_a_prompt_without_an_image(loaded: Any) -> None:
    model, processor = loaded["llava"]
    made = to_vllm_inputs(model, processor, ["what is red ?"], [[]], strategy="random", keep=3)
    ids = processor.tokenizer("what is red ?")["input_ids"]
    assert (made.requests, made.kept()) == ([{"prompt_token_ids": ids}], [[]])


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("qwen2_5_vl", {"strategy": "divprune", "keep": 4}, "VtpruneQwen2_5_VL"),
        ("video_llava", {"strategy": "divprune", "keep": 4}, "only for LlavaForConditional"),
        ("llava", {"strategy": "fastv", "keep": 4}, "acts inside the language model"),
        ("llava", {"strategy": "shortv"}, "acts inside the language model"),
        ("llava", {"strategy": "divprune", "keep": 4, "positions": "keep"}, "renumber"),
    ],
)
def test_what_embeddings_cannot_carry(loaded: Any, family: str, options: Any, said: str) -> None:
    model, processor = loaded[family]
    with pytest.raises(UnsupportedError, match=said):
        to_vllm_inputs(model, processor, [PROMPT], [[image(0, 42, 42)]], **options)


def test_different_counts_need_the_plug_in(loaded: Any) -> None:
    model, processor = loaded["llava_next"]
    given: Any = model, processor, [PROMPT, PROMPT], [[image(0, 28, 84)], [image(1, 28, 28)]]
    with pytest.raises(UnsupportedError, match=r"numbers of tokens \(\[.*\]\).*ragged=True"):
        to_vllm_inputs(*given, strategy="divprune", keep=4)
    assert len(to_vllm_inputs(*given, strategy="divprune", keep=4, ragged=True).requests) == 2


@pytest.mark.parametrize(
    ("prompts", "images"),
    [(PROMPT, [[0]]), ([PROMPT], []), ([PROMPT], [[]]), ([PROMPT], [[0, 0]]), ([TWO], [[0]])],
)
def test_prompts_and_images_that_do_not_fit(loaded: Any, prompts: Any, images: Any) -> None:
    pictures = [[image(0, 42, 42) for _ in own] for own in images]
    model, processor = loaded["llava"]
    with pytest.raises(InputError):
        to_vllm_inputs(model, processor, prompts, pictures, strategy="random", keep=3)


def names(loaded: Any, prompt: str = PROMPT, seeds: tuple[int, ...] = (0,), **options: Any) -> Any:
    given = {"strategy": "fastervlm", "keep": 7, "ragged": True, "uuids": True, **options}
    pictures = [image(seed, 42, 42) for seed in seeds]
    model, processor = loaded[given.pop("family", "llava")]
    made = to_vllm_inputs(model, processor, [prompt], [pictures], **given)
    return made.requests[0]["multi_modal_uuids"]["image"]


def test_a_name_covers_what_the_embeddings_depend_on(loaded: Any) -> None:
    one = names(loaded)
    assert one == names(loaded)
    other = PROMPT.replace("star", "cat")
    assert one == names(loaded, other)
    assert one[0] == names(loaded, TWO, (0, 1))[0]  # its neighbours do not matter
    changed = [
        names(loaded, seeds=(1,)),
        names(loaded, keep=8),
        names(loaded, keep=0.2),
        names(loaded, keep=0.3),
        names(loaded, strategy="divprune"),
        names(loaded, strategy="fastervlm", layers=(1,)),
        names(loaded, strategy="hiprune"),
        names(loaded, strategy="hiprune", alpha=0.3),
        names(loaded, strategy="fastervlm", scope="image"),
        names(loaded, processing={"do_normalize": False}),
    ]
    assert len({one[0], *(name for (name,) in changed)}) == 1 + len(changed)


def test_a_name_covers_the_prompt_where_it_is_read(loaded: Any) -> None:
    other = PROMPT.replace("star", "cat")
    assert names(loaded, strategy="trim") == names(loaded, strategy="trim")
    assert names(loaded, strategy="trim") != names(loaded, other, strategy="trim")


def test_a_name_covers_the_other_images_that_share_its_budget(loaded: Any) -> None:
    shared = {"strategy": "divprune", "scope": "sample"}
    first, second = (names(loaded, TWO, (0, seed), **shared)[0] for seed in (1, 2))
    assert first != second


def test_a_name_tells_an_image_that_is_cut_into_tiles_from_one_that_is_not(loaded: Any) -> None:
    alone = names(loaded, family="llava_onevision", strategy="divprune")
    beside = names(loaded, TWO, (0, 1), family="llava_onevision", strategy="divprune")
    assert alone[0] not in beside


def test_rows_are_on_the_cpu_in_the_models_dtype(loaded: Any) -> None:
    model, processor = tiny.build("llava")
    given: Any = processor, [PROMPT], [[image(0, 42, 42)]]
    made = to_vllm_inputs(model.to(torch.bfloat16), *given, strategy="divprune", keep=5)
    (rows,) = made.requests[0]["multi_modal_data"]["image"]
    assert (rows.shape, rows.dtype, rows.device.type) == ((5, 32), torch.bfloat16, "cpu")
