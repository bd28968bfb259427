"""What mini-qwen is trained on is what its processor and `generate` give it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vtprune.eval import mini_llava, scenes, shipped, train_attention
from vtprune.eval.mini_qwen import END, PREFIX, TOKEN, build_model, build_processor
from vtprune.eval.samples import Asker
from vtprune.eval.scene_things import SIZE
from vtprune.eval.train_answering import Words, answering_losses
from vtprune.eval.train_data import BLOCK, IGNORE, Writer
from vtprune.eval.train_qwen import (
    copy_loss,
    crop,
    inherit,
    mrope_positions,
    patchify,
    see_windows,
)

SIZES = [(SIZE, SIZE), (96, 160), (64, 32)]  # height, width
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def model():
    return build_model().eval()


def written(processor, size, n=1):
    return Writer(processor.tokenizer, ("standard",), n)(0, size)


def prompt(processor, size, question="what color is the 7 ?"):
    image = scenes.make_scene(0, "train").image.resize(size[::-1])
    return Asker(processor)([question], [image])


def test_shared_words_keep_their_ids(processor):
    ids = processor.tokenizer.get_vocab()
    theirs = mini_llava.build_tokenizer().get_vocab()
    shared = {word for word in theirs if word != "<image>"}
    assert all(ids[word] == theirs[word] for word in shared)
    assert len(ids) == len(theirs) + 3


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_the_processors(processor, size):
    pixels = written(processor, size).pixels
    given = prompt(processor, size)
    torch.testing.assert_close(patchify(pixels), given["pixel_values"])
    rows, cols = size[0] // TOKEN, size[1] // TOKEN
    n_image = (given["input_ids"] == processor.image_token_id).sum()
    assert n_image == rows * cols == given["image_grid_thw"].prod() // 4


@pytest.mark.parametrize("size", SIZES)
def test_positions_are_the_models(processor, model, size):
    given = prompt(processor, size)
    theirs, _ = model.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"]
    )
    ours = mrope_positions(len(PREFIX), size[0] // TOKEN, size[1] // TOKEN)
    n = theirs.shape[-1]
    assert torch.equal(ours[:, :n], theirs[:, 0])
    assert torch.equal(ours[:, n - 1 + BLOCK], ours[:, n - 1])  # the second block starts again


@pytest.mark.parametrize("size", SIZES)
def test_windows_at_once_are_windows_in_turn(processor, model, size):
    pixels = written(processor, size, 2).pixels
    grid = torch.tensor([[1, size[0] // 4, size[1] // 4]] * 2)
    with torch.no_grad():
        in_turn = model.model.visual(patchify(pixels), grid_thw=grid).pooler_output
        train_attention.use(model, windowed=model.model.visual)
        at_once = see_windows(model, pixels)
    torch.testing.assert_close(at_once.flatten(0, 1), in_turn, atol=1e-5, rtol=1e-5)


def test_packed_questions_are_questions_asked_alone(processor, model):
    """The loss of one block is that of the prompt that the processor makes of the same question."""
    batch = written(processor, (96, 160))
    block = slice(2 * BLOCK, 3 * BLOCK)
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, block] = batch.labels[:, block]
    batch.labels = labels
    first = int((labels[0, block] != IGNORE).nonzero()[0])
    words = processor.tokenizer.convert_ids_to_tokens(batch.ids[0, block][: first + 1].tolist())
    question = " ".join(words[:-2])
    train_attention.watch(model.model.language_model.layers[3].self_attn)
    train_attention.use(model, windowed=model.model.visual)
    positions = mrope_positions(len(PREFIX), 12, 20)[:, None]
    with torch.no_grad():
        image = see_windows(model, batch.pixels)
        known = Words.of(processor.tokenizer, CPU, PREFIX, [END])
        packed = answering_losses(model, image, batch, known, positions)["answer"]
        model.set_attn_implementation("sdpa")
        given = prompt(processor, (96, 160), question)
        answer = batch.labels[0, block][first:]
        answer = answer[answer != IGNORE][None]
        n = answer.shape[1]
        given["input_ids"] = torch.cat([given["input_ids"], answer], dim=1)
        for name in ("attention_mask", "mm_token_type_ids"):
            fill = torch.full_like(answer, int(name == "attention_mask"))
            given[name] = torch.cat([given[name], fill], dim=1)
        logits = model(**given).logits[0, -n - 1 : -1]
    alone = torch.nn.functional.cross_entropy(logits, answer[0])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_the_language_model_starts_as_mini_llavas(model):
    teacher: Any = shipped.load("mini-llava")[0]
    inherit(model, teacher)
    ours = model.model.language_model
    theirs = teacher.model.language_model
    assert torch.equal(ours.layers[7].mlp.up_proj.weight, theirs.layers[7].mlp.up_proj.weight)
    assert torch.equal(ours.embed_tokens.weight[:-3], theirs.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight[:-3], teacher.lm_head.weight)
    assert not ours.layers[0].self_attn.q_proj.bias.any()


def test_crops_keep_targets_where_they_are(processor):
    batch = written(processor, (SIZE, SIZE), 2)
    wanted = batch.thing[:, :, None].float()
    parts, features = crop(batch, wanted, (16, 16), 8)
    assert parts.pixels.shape == (8, 3, 64, 64)
    assert torch.equal(parts.pixels[5], batch.pixels[1, :, :64, 64:])
    thing = batch.thing.unflatten(-1, (16, 16))
    assert torch.equal(parts.thing[5].unflatten(-1, (8, 8)), thing[1, :8, 8:])
    assert torch.equal(features[..., 0], parts.thing.float())
    assert parts.sides.shape == (8, 4, 64)


def test_copying_nothing_but_the_mean_loses_all():
    wanted = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert copy_loss(wanted, wanted) == 0
    mean = wanted.mean((0, 1)).expand_as(wanted)
    torch.testing.assert_close(copy_loss(mean, wanted), torch.tensor(1.0))
