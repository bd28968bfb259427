"""The pair of towers: captions and their words, its start, what it is taught, saving, loading."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from vtprune import ConfigError, InputError
from vtprune.eval import mini_clip, mini_vit, train_clip
from vtprune.eval.scene_captions import (
    LENGTH,
    WORDS,
    altered,
    caption,
    make_pair,
    presence,
    tokenize,
)
from vtprune.eval.scene_objects import CLASSES, SIDE, class_of, make_picture
from vtprune.eval.scene_things import Thing

open_clip = pytest.importorskip("open_clip")
SOME = (
    Thing("7", "red", 0, 0, 60, 0, 20),
    Thing("circle", "blue", 0, 0, 2, 90, 20),
    Thing("3", "white", 0, 0, 90, 40, 20),
)


@torch.no_grad()
def scaled_up(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            std = 1.2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="module")
def model():
    """Untrained, with weights scaled up, so that features depend on what is seen and read."""
    return scaled_up(mini_clip.build_model()).eval()


def test_captions_name_things_from_left_to_right():
    assert caption(SOME) == "a blue circle, a red 7 and a white 3"
    assert caption(SOME[:2]) == "a blue circle and a red 7"
    assert caption(SOME[:1]) == "a red 7"
    pair = make_pair(5)
    assert pair.caption == caption(pair.picture.things)
    assert (pair.picture.pixels == make_picture(5, "test", 5).pixels).all()


def test_words_and_their_ids():
    (row,) = tokenize("a red 7 and a white 3").tolist()
    said = [WORDS[i] for i in row[: row.index(len(WORDS) - 1) + 1]]
    assert said == ["<start>", "a", "red", "7", "and", "a", "white", "3", "<end>"]
    assert row[9:] == [0] * (LENGTH - 9)
    assert tokenize([caption(SOME)] * 3).shape == (3, LENGTH)
    assert all(len(tokenize(make_pair(i).caption)) == 1 for i in range(100))
    with pytest.raises(InputError, match="has 'pink'; known words are a, ,, and, red"):
        tokenize("a pink 7")
    with pytest.raises(InputError, match="at most 20 are allowed"):
        tokenize("a red 7, " * 6)


@pytest.mark.parametrize("number", range(20))
def test_a_wrong_caption_is_wrong_about_one_thing(number):
    right, wrong = caption(SOME).split(), altered(SOME, number).split()
    differing = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
    assert len(differing) == 1
    assert altered(SOME, number) == altered(SOME, number)


def test_presence_by_hand():
    there = presence(SOME)
    assert {CLASSES[i] for i in there.nonzero()[:, 0]} == {"red 7", "blue circle", "white 3"}


def test_it_is_small_and_its_towers_meet(model):
    assert 4 * sum(p.numel() for p in model.parameters()) < 8e6
    assert len(model.visual.transformer.resblocks) == 12
    image = model.encode_image(torch.zeros(2, 3, SIDE, SIDE))
    assert image.shape == model.encode_text(tokenize(["a red 7", "a red 3"])).shape == (2, 96)


@torch.no_grad()
def test_it_starts_as_the_classifier():
    """With the same states of the last block the [CLS] is the same."""
    vit, ours = scaled_up(mini_vit.build_model()).eval(), mini_clip.build_model().eval()
    out = ours.visual.proj.clone()
    train_clip.inherit(ours.visual, vit)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    wanted = vit.forward_features(pixels)[:, 0] @ out
    torch.testing.assert_close(ours.encode_image(pixels), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_in_training_is_that_of_the_model(tmp_path):
    trainer = train_clip.ClipTrainer(tmp_path, torch.device("cpu"))
    tower = trainer.model.visual.eval()
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    found = tower(pixels)
    for block in tower.transformer.resblocks:
        del block.attention
    for ours, theirs in zip(found, tower(pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    trainer.save(tmp_path / "model")
    assert mini_clip.load(tmp_path / "model")(pixels)[0].shape == (2, 96)


def test_contrast_by_hand():
    images, wrong = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, -1]])
    scale = torch.tensor(2.0)
    values = train_clip.contrast(images, torch.cat([torch.eye(3), wrong]), scale)
    logits = 2 * torch.cat([torch.eye(3), F.normalize(wrong, dim=-1).T], dim=1)
    forth = -logits.log_softmax(1).diagonal().mean()
    back = -(2 * torch.eye(3)).log_softmax(1).diagonal().mean()
    assert float(values["contrast"]) == pytest.approx(float((forth + back) / 2), abs=1e-6)
    swapped = train_clip.contrast(images, torch.cat([torch.eye(3)[[1, 0, 2]], wrong]), scale)
    assert float(swapped["text_acc"]) == pytest.approx(1 / 3)


def test_a_batch_by_hand():
    shown, pair = train_clip.shown(7, 2), make_pair(8, "train")
    assert torch.equal(shown.captions[1], tokenize(pair.caption)[0])
    assert (shown.wrong[1] != shown.captions[1]).sum() == 1
    present = {class_of(thing) for thing in pair.picture.things}
    assert set(shown.present[1].nonzero()[:, 0].tolist()) == present
    pixels = torch.tensor(pair.picture.pixels).permute(2, 0, 1).float()
    torch.testing.assert_close((shown.pixels[1] + 1) * 127.5, pixels, atol=1e-3, rtol=0)


@torch.no_grad()
def test_what_is_saved_is_loaded_here_and_by_open_clip(model, tmp_path):
    mini_clip.save(model, tmp_path)
    pixels, ids = torch.randn(2, 3, SIDE, SIDE), tokenize(["a red 7", "a red 3"])
    wanted = model(pixels, ids)[:2]
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    for loaded in (mini_clip.load(tmp_path), theirs):
        for found, feature in zip(loaded(pixels, ids)[:2], wanted, strict=True):
            torch.testing.assert_close(found, feature, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 95
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded: Error"):
        mini_clip.load(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks open_clip_model\.safetensors"):
        mini_clip.load(tmp_path)
