"""Masked images, and what says where they are about a question."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor

from tests import tiny
from tests.clip import ClipTokenizer, clip
from tests.families import batches, prompts
from tests.families.oracles import model_of
from tests.probes import generate
from vtprune import ConfigError, InputError, UnsupportedError
from vtprune.contrast import (
    AttentionSaliency,
    CLIPSaliency,
    ContrastiveDecoder,
    Saliency,
    focus,
    masked,
)
from vtprune.contrast.looking import look


def bright(width: int, height: int) -> Image.Image:
    """A picture without a black pixel."""
    return prompts.image(0, width, height).point([max(x, 1) for x in range(256)] * 3)


def pixels_of(image: Image.Image) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def black(image: Image.Image) -> torch.Tensor:
    return pixels_of(image).eq(0).all(-1)


@pytest.mark.parametrize(("match", "share"), [(1.0, 0.5), (0.4, 0.8), (0.0, 1.0), (-1.0, 1.0)])
def test_the_better_the_match_the_less_stays(match: float, share: float) -> None:
    image = bright(50, 40)
    ramp = torch.linspace(0, 1, 12).view(3, 4)
    made = black(masked(image, Saliency(ramp, match)))
    assert int((~made).sum()) == min(int(2000 * min(share, 1 - 1e-5)) + 1, 2000)
    if share < 1:
        assert made[0, 0] and not made[-1, -1]
        stays = ~made
        other = masked(image, Saliency(ramp, match))
        assert torch.equal(pixels_of(image)[stays], pixels_of(other)[stays])


def test_the_map_is_smoothed() -> None:
    """One hot token of 3 x 3 keeps a round spot about its middle, whatever the scale of the map."""
    image = bright(60, 60)
    hot = torch.zeros(3, 3)
    hot[1, 1] = 1.0
    one = masked(image, Saliency(hot, 1.0))
    assert one.tobytes() == masked(image, Saliency(7 * hot - 2, 1.0)).tobytes()
    made = ~black(one)
    assert made[20:40, 20:40].all() and torch.equal(made, made.T)


def test_pixels_are_ranked_by_the_smoothed_map() -> None:
    image, generator = bright(50, 40), torch.Generator().manual_seed(0)
    values = torch.rand(40, 50, generator=generator)
    x = torch.arange(-4, 5).float()  # 0.02 of the longer side is 1; four deviations each way
    weights = (-x.square() / 2).exp()
    weights = weights[:, None] * weights / weights.sum() ** 2
    wide = F.pad(values[None, None], (4, 4, 4, 4), mode="replicate")
    smooth = F.conv2d(wide, weights[None, None])[0, 0]
    made = black(masked(image, Saliency(values, 1.0)))
    assert smooth[made].max() < smooth[~made].min() + 1e-6
    assert values[made].max() > values[~made].min() + 0.1


def test_masked_refuses() -> None:
    image = prompts.image(0, 8, 8)
    with pytest.raises(ConfigError, match=r"match=1\.5"):
        masked(image, Saliency(torch.ones(2, 2), 1.5))
    with pytest.raises(InputError, match="finite values"):
        masked(image, Saliency(torch.ones(2), 0.5))


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    image = prompts.image(0, 8, 8)
    for call in (
        lambda: masked(image, Saliency(torch.ones(2, 2), 0.5)),
        lambda: focus(image, torch.ones(2, 2)),
    ):
        with pytest.raises(ImportError, match=r"vtprune\[eval\]"):
            call()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_of_the_words(family: str) -> None:
    model, processor = model_of(family)
    image, question = prompts.image(3, 60, 84), "Is it green?"
    made = AttentionSaliency(model, processor, layers=(1, 2), match=0.3)(image, question)
    batch = batches.of(processor, prompts.user(image, question))
    (seen,) = look(model, batch, (1, 2), words=True)
    assert seen.grid is not None and made.map.shape == seen.grid[1:]
    assert torch.allclose(made.map.flatten(), seen.attention[0].mean(0))
    assert made.match == 0.3


@pytest.mark.slow
def test_attention_needs_a_grid() -> None:
    model, processor = model_of("llava_next")
    with pytest.raises(UnsupportedError, match="form no grid"):
        AttentionSaliency(model, processor)(prompts.image(3, 60, 84), "Is it green?")


def test_clip_says_where_and_how_well() -> None:
    model, tokenizer = clip(), ClipTokenizer()
    image_processor = CLIPImageProcessor(
        size={"height": tiny.SIDE, "width": tiny.SIDE}, do_center_crop=False
    )
    saliency = CLIPSaliency(model, tokenizer, image_processor)
    image = prompts.image(2, 60, 30)
    made = saliency(image, "a red ball")
    with torch.no_grad():
        ids = torch.tensor([tokenizer("a red ball")["input_ids"]])
        padded = torch.zeros(1, 6, dtype=torch.long)
        padded[:, : ids.shape[1]] = ids
        mask = (torch.arange(6) < ids.shape[1]).long()[None]
        pixels = image_processor(image, return_tensors="pt")["pixel_values"]
        out = model(input_ids=padded, attention_mask=mask, pixel_values=pixels)
        hidden = model.vision_model(pixels).last_hidden_state[0, 1:]
        tokens = model.visual_projection(model.vision_model.post_layernorm(hidden))
    assert made.map.shape == (tiny.SIDE // tiny.PATCH,) * 2
    cosine = (out.image_embeds @ out.text_embeds.T).item()
    assert made.match == pytest.approx(cosine, abs=1e-5)
    wanted = -F.cosine_similarity(tokens, out.text_embeds)
    assert torch.allclose(made.map.flatten(), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="crops"):
        CLIPSaliency(model, tokenizer, CLIPImageProcessor())


def test_the_masked_image_is_decoded_with() -> None:
    model, processor = model_of("llava")
    image, question = prompts.image(3, 60, 84), "Is it green?"
    saliency = AttentionSaliency(model, processor, match=1.0)(image, question)
    whole, part = (
        batches.of(processor, prompts.user(each, question))
        for each in (image, masked(image, saliency))
    )
    plain = generate(model, whole, 4)[0]
    decoder = ContrastiveDecoder(model, part, alpha=2.0, beta=0.5, sign=1)
    made = generate(model, whole, 4, logits_processor=[decoder])[0]
    weak = ContrastiveDecoder(model, part, alpha=0.0, beta=0.5, sign=1)
    assert torch.equal(generate(model, whole, 4, logits_processor=[weak])[0], plain)
    assert made.shape == plain.shape
