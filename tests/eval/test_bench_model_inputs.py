"""Shapes of the shipped configurations, and inputs made from a configuration alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vtprune
from tests.eval.bench_tiny import write_tiny
from vtprune.errors import ConfigError
from vtprune.eval import bench_model_inputs as making
from vtprune.eval import tiny
from vtprune.eval.bench_model_inputs import FAMILIES, Made, default_size, parse_size, picture
from vtprune.eval.bench_model_random import config_names, random_model, read_config

# Parameters as published, and visual tokens of the picture that is shown by default. LLaVA-NeXT:
# 576 of the base view and 48 x 48 of the tiles are 2880, and 48 newlines; OneVision likewise.
PUBLISHED = {
    "internvl3-8b": (7.94e9, 5 * 256),
    "llava-1.5-7b": (7.06e9, 576),
    "llava-300m": (0.311e9, 576),
    "llava-next-7b": (7.06e9, 2880 + 48),
    "llava-onevision-7b": (8.03e9, 27**2 + 54**2 + 54),
    "qwen2-vl-7b": (8.29e9, 36**2),
    "qwen2.5-vl-7b": (8.29e9, 36**2),
    "qwen3-vl-8b": (8.77e9, 32**2),
}
CPU = torch.device("cpu")


def test_every_configuration_has_published_figures():
    assert config_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_those_of_the_checkpoint(name):
    config = read_config(name)
    with torch.device("meta"):  # allocates nothing
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    parameters, tokens = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    made = Made(model)
    pixels = dict(made.images([picture(default_size(config))], return_tensors="pt"))
    assert sum(made.counts(pixels)) == tokens
    assert type(model).__name__ == config.architectures[0]


# Pictures that fit the limits of the tiny processors; those of InternVL are in fewer tiles.
SIZES = {"internvl": (84, 84)}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in tiny.names()])
def test_made_inputs_are_those_of_the_family_s_processor(family):
    model, processor = tiny.build(family)
    size = SIZES.get(family, (70, 56))
    made = Made(model)
    if family == "internvl":  # its tiny processor makes at most 4 tiles
        made.images.max_patches = processor.image_processor.max_patches
    ours = made(2, size)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    real = processor(text=[text] * 2, images=[picture(size)] * 2, return_tensors="pt")
    assert ours.keys() == real.keys()
    assert ours["pixel_values"].shape == real["pixel_values"].shape
    for name in ours.keys() - {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}:
        assert torch.equal(ours[name], real[name])
    counts = [(x["input_ids"] == model.config.image_token_id).sum(1) for x in (ours, real)]
    assert torch.equal(*counts)
    assert ours["input_ids"].shape[1] == counts[0][0] + making.WORDS
    with vtprune.wrap(model, "strided", keep=0.5) as handle:
        model.generate(**ours, max_new_tokens=2)
        assert handle.report().of_sample(1)[0] == counts[0][1]


def test_rows_are_equal_and_words_no_placeholders():
    model, _ = tiny.build("qwen3_vl")
    found = Made(model)(3, (70, 70))
    ids, config = found["input_ids"], model.config
    assert len(ids) == 3 and torch.equal(ids[0], ids[2])
    assert torch.equal(found["mm_token_type_ids"] == 1, ids == config.image_token_id)
    assert not (ids == config.video_token_id).any() and ids.max() < config.text_config.vocab_size


@pytest.mark.parametrize(
    ("text", "size"), [("672", (672, 672)), ("672x448", (672, 448)), (" 64X32 ", (64, 32))]
)
def test_a_resolution_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "1x2x3", "-4", "8", "640x", "9000", "0.5"])
def test_a_resolution_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--resolution"):
        parse_size(text)


def test_the_size_of_any_picture_is_what_the_processor_takes():
    model, processor = tiny.build("qwen2_5_vl")
    assert default_size(model.config) == (1008, 1008)
    assert default_size(model.config, processor) == (84, 84)
    model, processor = tiny.build("llava_next")
    assert default_size(model.config, processor) == (56, 56)


def test_a_model_is_built_as_its_configuration_says(tmp_path):
    made = []
    for seed in (1, 2):  # which is not what the weights depend on
        torch.manual_seed(seed)
        made.append(random_model(write_tiny(tmp_path), CPU, "bfloat16", "eager"))
        assert torch.initial_seed() == seed
    model, again = made
    assert model.dtype is torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "eager"
    assert all(
        torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert model.generation_config.suppress_tokens == [99]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no config.json"),
        ("[]", "is no config.json"),
        ("{}", "is no config.json"),
        ('{"model_type": "gemma3"}', "of model_type 'gemma3', whose inputs cannot be made"),
        ('{"model_type": "llava", "image_seq_length": "many"}', "makes no llava configuration"),
        ('{"model_type": "llava", "vision_config": {"model_type": "no"}}', "makes no llava"),
    ],
)
def test_a_damaged_configuration_is_refused(text, said, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_config(str(file))


def test_an_unknown_configuration_is_named():
    with pytest.raises(ConfigError, match=r"Unknown configuration 'llava-7b'\. Did you mean 'llav"):
        read_config("llava-7b")


def test_an_attention_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be built on cpu in float32"):
        random_model(write_tiny(tmp_path), CPU, "float32", "no_attention")


def test_a_family_without_a_rule_is_refused():
    model, _ = tiny.build("gemma3")
    with pytest.raises(ConfigError, match="Inputs of 'gemma3' cannot be made"):
        Made(model)
