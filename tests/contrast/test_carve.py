"""Two passes, what they looked at, and what is left of an image by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vtprune
from tests.contrast.slow import alone, extended, whole
from tests.families import batches, prompts
from tests.families.oracles import model_of
from tests.probes import generate
from vtprune import ConfigError, InputError
from vtprune.contrast import Given, focus, relevance
from vtprune.contrast.carve import default_layers
from vtprune.contrast.looking import look
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.types import Facts

QUICK = ("llava", "qwen2_5_vl")
LAYERS = (1, 3)


def other_words(family: str) -> batches.Batch:
    """The images of the usual batch under another question."""
    talks = [[dict(turn) for turn in talk] for talk in prompts._KINDS["ragged"](0)]
    for talk in talks:
        words = {"type": "text", "text": "Describe."}
        talk[0]["content"] = [*talk[0]["content"][:-1], words]
    return batches.of(model_of(family)[1], *talks)


def runs(columns: Tensor) -> list[Tensor]:
    """Columns ``[n]``, cut where they do not follow each other."""
    cuts = (columns.diff() > 1).nonzero()[:, 0] + 1
    return list(columns.tensor_split(cuts.tolist()))


@torch.no_grad()
def eager(family: str, steps: int, *, words: bool = False) -> list[Tensor]:
    """Attention ``[T, NL, n]`` to each image, by probabilities of an eager model without cache."""
    model, (sdpa, _) = model_of(family, "eager")[0], model_of(family)
    found = []
    text = generate(sdpa, whole(family), steps)[0]
    for single, new in zip(alone(family), text, strict=True):
        token = model.config.image_token_id
        spots = (single["input_ids"][0] == token).nonzero()[:, 0]
        maps = []
        for step in range(steps):
            out = model(**extended(single, new[:step]), output_attentions=True, use_cache=False)
            length = single["input_ids"].shape[1]
            rows = slice(int(spots[-1]) + 1, length) if words and not step else slice(-1, None)
            maps.append(torch.stack([out.attentions[i][0, :, rows].mean((0, 1)) for i in LAYERS]))
        for image in runs(spots):
            found.append(torch.stack([each[:, image] for each in maps]))
    return found


@pytest.mark.parametrize("family", QUICK)
def test_looks_equal_an_eager_model(family: str) -> None:
    model = model_of(family)[0]
    made = look(model, whole(family), LAYERS, 3)
    wanted = eager(family, 3)
    assert len(made) == len(wanted) == 3
    for one, other in zip(made, wanted, strict=True):
        assert one.grid is not None and one.grid[1] * one.grid[2] == other.shape[-1]
        assert one.attention.shape == other.shape
        assert (one.attention - other).abs().max() < 1e-5


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "llava"])
def test_looks_of_words_equal_an_eager_model(family: str) -> None:
    made = look(model_of(family)[0], whole(family), LAYERS, 1, words=True)
    for one, other in zip(made, eager(family, 1, words=True), strict=True):
        assert (one.attention - other).abs().max() < 1e-5


def test_a_wrapped_model_looks_unwrapped() -> None:
    model = model_of("llava")[0]
    wanted = look(model, whole("llava"), LAYERS, 2)
    with vtprune.wrap(model, "divprune", keep=4) as handle:
        made = look(model, whole("llava"), LAYERS, 2)
        assert handle.selections == []
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one.attention, other.attention)


def test_an_answer_ends_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava")[0]
    ids = generate(model, whole("llava"), 4)[0]
    end = int(ids[0, 1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    steps = [(row == end).nonzero()[:1, 0].tolist() for row in ids]
    lengths = [at[0] + 1 if at else 4 for at in steps]
    made = look(model, whole("llava"), LAYERS, 4)
    assert lengths[0] == 2
    assert [len(one.attention) for one in made] == [lengths[0], lengths[1], lengths[1]]


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "llava"])
@pytest.mark.parametrize("steps", ["first", "last", "all"])
def test_relevance_is_the_ratio_of_two_passes(family: str, steps: Any) -> None:
    model, asked, general = model_of(family)[0], whole(family), other_words(family)
    made = relevance(model, asked, general, layers=LAYERS, steps=steps, max_new_tokens=3)
    first, second = look(model, asked, LAYERS, 3), look(model, general, LAYERS, 3)
    for one, a, g in zip(made, first, second, strict=True):
        ratio = a.attention / (g.attention + 1e-8)
        weights = {"first": [1, 0, 0], "last": [0, 0, 1], "all": [1, 2, 3]}[steps]
        wanted = sum(w * ratio[t].sum(0) for t, w in enumerate(weights))
        assert torch.allclose(one.attention[0, 0], torch.as_tensor(wanted), rtol=1e-4)
    same = relevance(model, asked, asked, layers=LAYERS, steps=steps, max_new_tokens=3)
    for one in same:
        assert (one.attention / one.attention.amax() > 0.999).all()


@pytest.mark.parametrize("family", QUICK)
def test_tokens_are_kept_by_relevance(family: str) -> None:
    model, inputs = model_of(family)[0], whole(family)
    found = relevance(model, inputs, other_words(family), layers=LAYERS, steps="first")
    scores = [one.attention[0, 0] for one in found]
    with vtprune.wrap(model, Given(scores), keep=5) as handle:
        generate(model, inputs, 2)
        for selection, score in zip(handle.selections, scores, strict=True):
            assert torch.equal(selection.rows, topk_sorted(score[None], 5))
    with (
        vtprune.wrap(model, Given(scores[:1]), keep=5),
        pytest.raises(InputError, match="Wrap anew for each batch"),
    ):
        generate(model, inputs, 2)


def test_layers_are_the_published_ones_of_deep_models() -> None:
    def of(depth: int) -> tuple[int, ...]:
        return default_layers(Facts(24, 22, True, frozenset(), decoder_layers=depth))

    assert of(28) == of(32) == of(36) == (20, 21, 22, 23, 24, 25)
    assert of(14) == (10, 11, 12)
    assert of(12) == (9, 10, 11)
    assert all(max(of(depth)) < depth for depth in range(1, 29))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"layers": (0, 99)}, ConfigError, "give some of 0 to"),
        ({"layers": ()}, ConfigError, "give some of 0 to"),
        ({"steps": "middle"}, ConfigError, "steps='middle'"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
    ],
)
def test_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = model_of("llava")[0], whole("llava")
    with pytest.raises(error, match=message):
        relevance(model, inputs, inputs, **wrong)


def test_refuses_batches() -> None:
    model, inputs = model_of("llava")[0], whole("llava")
    bare = batches.of(model_of("llava")[1], prompts.user("How many?"))
    with pytest.raises(InputError, match="no image to look at"):
        look(model, bare, LAYERS)
    flipped = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="padding_side='left'"):
        look(model, flipped, LAYERS)
    with pytest.raises(InputError, match="the general instruction 1"):
        relevance(model, inputs, alone("llava")[0], layers=LAYERS, steps="first")


def spots(size: tuple[int, int], boxes: dict[tuple[int, int, int, int], float]) -> Tensor:
    """A map ``[H, W]`` of small distinct values, and higher ones in boxes (rows, then columns)."""
    values = torch.arange(size[0] * size[1]).view(size) * 1e-7
    for (top, bottom, left, right), value in boxes.items():
        values[top:bottom, left:right] += value
    return values


def test_focus_keeps_the_parts_with_most_relevance() -> None:
    image = prompts.image(0, 40, 20)
    boxes = {(2, 4, 4, 8): 5.0, (4, 6, 8, 10): 4.0, (10, 14, 20, 24): 3.0, (15, 16, 30, 31): 60.0}
    values = spots((20, 40), boxes)  # the first two touch at a corner alone: 4 parts
    kept = 8 + 4 + 16 + 1
    made = focus(image, values, share=(kept - 0.5) / 800)
    # The sums are 40, 16, 48 and, of one pixel, 60: the second goes, which is not the smallest.
    cut = Image.new("RGB", image.size)
    for top, bottom, left, right in list(boxes)[:1] + list(boxes)[2:]:
        box = (left, top, right, bottom)
        cut.paste(image.crop(box), box)
    wanted = cut.crop((4, 2, 31, 16))
    scale = max(40 / 27, 20 / 14)
    wanted = wanted.resize((round(27 * scale), round(14 * scale)), Image.Resampling.LANCZOS)
    assert made.size == wanted.size == (40, 21)
    assert made.tobytes() == wanted.tobytes()
    assert focus(image, values, share=(kept - 0.5) / 800, parts=1.0).tobytes() != made.tobytes()


def test_focus_enlarges_a_coarse_map() -> None:
    image = prompts.image(1, 64, 48)
    coarse = torch.zeros(3, 4)
    coarse[2, 3] = 1.0
    made = focus(image, coarse, share=0.1)
    assert made.size[0] >= 64 and made.size[1] >= 48
    assert focus(image, torch.ones(3, 4)).tobytes() == image.tobytes(), "all is equally relevant"


def test_focus_refuses() -> None:
    image = prompts.image(0, 8, 8)
    with pytest.raises(ConfigError, match="share=0"):
        focus(image, torch.ones(2, 2), share=0)
    with pytest.raises(ConfigError, match="parts=2"):
        focus(image, torch.ones(2, 2), parts=2)
    with pytest.raises(InputError, match=r"shape \(4,\)"):
        focus(image, torch.ones(4))
    with pytest.raises(InputError, match="finite"):
        focus(image, torch.full((2, 2), torch.nan))
