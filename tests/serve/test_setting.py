"""What an engine is told, what it refuses and why, and how many tokens it promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import vtprune
from tests.families.prompts import image
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.registry import keeping_names
from vtprune.serve.setting import read_setting
from vtprune.serve.static import Static
from vtprune.serve.towers import LlavaNextTower, LlavaTower, QwenTower, Tower

TOWERS: dict[str, type[Tower]] = {
    "llava": LlavaTower,
    "llava_siglip": LlavaTower,
    "llava_next": LlavaNextTower,
    "qwen2_5_vl": QwenTower,
}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {family: tiny.build(family) for family in TOWERS}


def static(models: Any, family: str, **told: Any) -> Static:
    config = models[family][0].config
    setting = read_setting(SimpleNamespace(vtprune=told))
    return Static(TOWERS[family](config), setting)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "nothing under 'vtprune'"),
        ("fastervlm", "give keys as in"),
        ({"strategy": "fastervlm", "keeep": 8}, "Did you mean 'keep'"),
        ({"keep": 8}, "names no strategy"),
        ({"strategy": "fastervlmm", "keep": 8}, "Did you mean 'fastervlm'"),
        ({"strategy": ["fastervlm", "divprune"], "keep": 8}, "to_vllm_inputs"),
        ({"strategy": "hiprune", "options": {"alfa": 1}, "keep": 8}, "Did you mean 'alpha'"),
        ({"strategy": "hiprune", "options": 3, "keep": 8}, "give names with values"),
        ({"strategy": "hiprune", "options": {"alpha": 2}, "keep": 8}, "alpha=2"),
        ({"strategy": "fastervlm"}, "keep is missing"),
        ({"strategy": "fastervlm", "keep": 1.5}, "keep=1.5 is not a share"),
        ({"strategy": "fastervlm", "keep": 0}, "keep=0 keeps nothing"),
        ({"strategy": "fastervlm", "keep": "8"}, "is not a budget"),
        ({"strategy": "shortv", "keep": 8}, "lets no token leave"),
        ({"strategy": None, "keep": 8}, "keep: no strategy is named"),
    ],
)
def test_what_cannot_be_meant(told: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_setting(SimpleNamespace(vtprune=told))


def test_options_of_json_are_those_of_the_strategy() -> None:
    told = {"strategy": "hiprune", "options": {"alpha": 0.2, "layers": [1, 2]}, "keep": 0.5}
    setting = read_setting(SimpleNamespace(vtprune=told))
    assert setting is not None
    assert (setting.strategy.layers, setting.budget.fraction) == ((1, 2), 0.5)
    assert read_setting(SimpleNamespace(vtprune={"strategy": None})) is None


@pytest.mark.parametrize(
    ("family", "told", "said"),
    [
        ("llava", {"strategy": "fastv"}, "fastv acts inside the language model"),
        ("llava", {"strategy": "dyvte"}, "dyvte acts inside the language model"),
        ("llava", {"strategy": "flowcut"}, "between blocks of the tower"),
        ("llava_next", {"strategy": "visiondrop"}, "acts inside the language model"),
        ("llava", {"strategy": "tome"}, "between blocks of the tower"),
        ("llava", {"strategy": "trim"}, "trim reads the instruction"),
        ("llava", {"strategy": "hiprune", "options": {"plus": True}}, "reads the instruction"),
        ("llava", {"strategy": "pyramiddrop"}, "as many tokens as the image asks for"),
        ("llava", {"strategy": "todre"}, "builds the tower up to block 2 alone"),
        ("llava", {"strategy": "fastervlm", "keep": 37}, "an image has 36 tokens"),
        ("llava", {"strategy": "fastervlm", "positions": "keep"}, "can only renumber"),
        ("llava", {"strategy": "fastervlm", "positions": "row"}, "choose 'keep' or 'renumber'"),
        ("qwen2_5_vl", {"strategy": "fastervlm", "positions": "renumber"}, "can only keep"),
        ("llava", {"strategy": "fastervlm", "scope": "sample"}, "share one budget"),
        ("llava", {"strategy": "fastervlm", "scope": "tyle"}, "scope='tyle' is unknown"),
        ("llava", {"strategy": "fastervlm", "newlines": "keep"}, "no tokens that end a row"),
        ("llava_next", {"strategy": "fastervlm", "newlines": "row"}, "how many newlines stay"),
        ("llava_next", {"strategy": "fastervlm", "newlines": "tile"}, "choose 'keep' or 'row'"),
    ],
)
def test_what_no_engine_can_serve(models: Any, family: str, told: Any, said: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=said):
        static(models, family, **{"keep": 8, **told})


SIZES = ((28, 28), (60, 28), (30, 90), (56, 56), (57, 41), (200, 20))  # width, height


def inputs_of(processor: Any, images: list[Image.Image]) -> Any:
    token = processor.image_token
    marked = f"<|vision_start|>{token}<|vision_end|>" if "|" in token else token
    return processor(text=[" ".join([marked] * len(images))], images=images, return_tensors="pt")


def promised_and_kept(models: Any, family: str, names: Any, keep: float) -> set[str]:
    """Compares what is promised, by sizes alone, with what is kept; returns what is served."""
    model, processor = models[family]
    inputs = inputs_of(processor, [image(i, *size) for i, size in enumerate(SIZES)])
    batch = {"n_images": len(SIZES), **inputs}
    if "image_sizes" in inputs:
        batch["image_sizes"] = inputs["image_sizes"].tolist()
    served = set()
    for name in names:
        try:
            promised = static(models, family, strategy=name, keep=keep).counts(batch)
            with vtprune.wrap(model, name, keep=keep) as handle:
                handle.encode(inputs)
        except (ConfigError, UnsupportedError):  # refused, or too few tokens for what it does
            continue
        kept = [selection.rows.shape[1] for selection in handle.selections]
        assert promised == kept, name
        served.add(name)
    return served


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("keep", [3, 0.3])
def test_what_is_promised_is_what_wrap_keeps(models: Any, family: str, keep: float) -> None:
    some = {"divprune", "fastervlm", "vispruner"}  # by tokens, by signals, in the tower's output
    assert promised_and_kept(models, family, some, keep) == some


@pytest.mark.slow
@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("keep", [1, 8, 1.0])
def test_whatever_is_served_keeps_what_is_promised(models: Any, family: str, keep: float) -> None:
    served = promised_and_kept(models, family, keeping_names(), keep)
    assert served >= {"divprune", "fastervlm", "hiprune", "random", "strided", "vispruner"}


def test_nothing_is_pruned_where_no_strategy_is_named(models: Any) -> None:
    config = models["llava"][0].config
    assert Static(LlavaTower(config), None).counts({"n_images": 2}) == [36, 36]
