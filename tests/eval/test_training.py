"""What the training of shipped models is made of; the training itself is too long for a test."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vtprune.eval import train_llava, train_qwen, train_vit
from vtprune.eval.mini_llava import GRID, PREFIX, build_model, build_tokenizer
from vtprune.eval.scene_questions import KINDS, Question
from vtprune.eval.scene_things import NAMES, SIZE, Thing
from vtprune.eval.scenes import DENSE
from vtprune.eval.train_answering import packed_mask, packed_positions
from vtprune.eval.train_attention import attention
from vtprune.eval.train_data import (
    BLOCK,
    COLOR_NAMES,
    IGNORE,
    N_BLOCKS,
    Writer,
    choose,
    image_targets,
    token_targets,
)

NATIVE = (SIZE, SIZE)

# A 4 in the cell at the top left, and two cells to the right of it a circle, three pixels lower.
THINGS = (Thing("4", "red", 0, 0, 0, 0), Thing("circle", "blue", 0, 2, 32, 3))


def test_token_targets_by_hand():
    name, color, place, *sides = (t.reshape(GRID, GRID) for t in token_targets(THINGS, NATIVE))
    circle = 1 + NAMES.index("circle")
    assert name[:4, :8].tolist() == [
        [5, 5, 0, 0, circle, circle, 0, 0],
        [5, 5, 0, 0, circle, circle, 0, 0],
        [0, 0, 0, 0, circle, circle, 0, 0],  # three of eight rows are covered
        [0] * 8,
    ]
    assert color[0, 0] == COLOR_NAMES.index("red")
    assert (color[name == 0] == IGNORE).all()
    assert place[0, 0] == 0
    left, right, above, below = sides
    assert right[0, 0] == circle
    assert left[1, 5] == 5
    assert above[0, 0] == below[0, 0] == left[0, 0] == 0


def test_edges_are_ignored():
    shifted = (Thing("4", "red", 0, 0, 1, 0),)
    name = token_targets(shifted, NATIVE)[0].reshape(GRID, GRID)
    assert name[0, :4].tolist() == [5, 5, IGNORE, 0]


def test_token_targets_of_a_stretched_scene():
    name = token_targets(THINGS, (64, 256))[0].reshape(8, 32)
    circle = 1 + NAMES.index("circle")
    assert name[:3, :13].tolist() == [
        [5] * 4 + [0] * 4 + [circle] * 4 + [0],
        [0] * 8 + [IGNORE] * 4 + [0],  # three of sixteen rows are covered
        [0] * 13,
    ]


def test_image_targets_by_hand():
    present, counts = image_targets(THINGS)
    on = {n for n, p in zip((*NAMES, *COLOR_NAMES), present, strict=True) if p}
    assert on == {"4", "circle", "red", "blue"}
    assert counts == [1, 1]


def test_labels_are_the_words_that_follow():
    tokenizer = build_tokenizer()
    batch = Writer(tokenizer, ("standard", "hard"), 2)(0, (96, 160))
    assert batch.native.shape == (2, 3, 128, 128)
    assert batch.pixels.shape == (2, 3, 96, 160)
    assert batch.sides.shape == (2, 4, 12 * 20)
    ids, labels = (t.reshape(2, N_BLOCKS, BLOCK) for t in (batch.ids, batch.labels))
    asked = labels[:, :, :-1] != IGNORE
    assert torch.equal(labels[:, :, :-1][asked], ids[:, :, 1:][asked])
    words = [tokenizer.convert_ids_to_tokens(block) for block in ids[0].tolist()]
    assert all(":" in block and "</s>" in block for block in words)
    number = words[batch.kinds[0].tolist().index(KINDS.index("number"))]
    start = number.index(":") + 1
    assert all(word.isdigit() for word in number[start : number.index("</s>")])
    assert (labels[0] != IGNORE).sum(-1).min() >= 2  # every answer and its end
    early = batch.early.reshape(2, N_BLOCKS, BLOCK)[0]
    for block, labelled, told in zip(words, labels[0], early, strict=True):
        assert set(told[told != IGNORE].tolist()) == {int(labelled[labelled != IGNORE][0])}
        first = block[int((told != IGNORE).nonzero()[0])]
        assert first in {*COLOR_NAMES, *NAMES, "digits", "shapes", "written"}


def test_every_task_gets_its_share():
    many = [Question(task, f"{task} {i}", "yes") for task in KINDS for i in range(9)]
    chosen = [question.kind for question in choose(many)]
    assert len(chosen) == N_BLOCKS
    assert set(chosen) == set(KINDS)
    assert chosen.count("presence") == 2  # never more "yes" than "no" could answer


def test_blocks_see_the_prefix_and_themselves():
    prefix = len(PREFIX) + 4
    mask = packed_mask(prefix, torch.device("cpu"))
    positions = packed_positions(prefix, torch.device("cpu"))
    second = prefix + BLOCK
    assert mask[0, 0, second, : prefix + 1].tolist() == [True] * prefix + [False]
    assert mask[0, 0, second].sum() == prefix + 1
    assert positions[second] == positions[prefix] == prefix


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_sdpa(masked):
    generator = torch.Generator().manual_seed(0)
    shape, n = (3, 2, 7, 4), 7
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    q, k, v = (t.requires_grad_() for t in tensors[:3])
    mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None] if masked else None
    ours = attention(None, q, k, v, mask)[0].transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), tensors[3]),
        torch.autograd.grad(theirs, (q, k, v), tensors[3]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "trainer", "stages", "named"),
    [
        (train_llava, train_llava.LlavaTrainer, (0, 3), "LlavaForConditionalGeneration"),
        (train_qwen, train_qwen.QwenTrainer, (1, 3), "Qwen2_5_VLForConditionalGeneration"),
        (train_vit, train_vit.VitTrainer, (0, 1), "vit_tiny_patch16_224"),
    ],
    ids=["llava", "qwen", "vit"],
)
def test_a_stopped_training_goes_on_where_it_was(
    tmp_path, monkeypatch, module, trainer, stages, named
):
    if module is train_vit:
        pytest.importorskip("timm")
    short = tuple(replace(module.STAGES[i], steps=2, batch=2, part=1) for i in stages)
    monkeypatch.setattr(module, "STAGES", short)
    cpu = torch.device("cpu")
    trainer(tmp_path / "whole", cpu).run()
    stopped = trainer(tmp_path / "stopped", cpu)
    losses, seen = stopped.losses, []

    def fail_in_the_last_step(stage, batch):
        seen.append(stage.name)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return losses(stage, batch)

    monkeypatch.setattr(stopped, "losses", fail_in_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    trainer(tmp_path / "stopped", cpu).run()
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert config.get("architecture", config.get("architectures")) in (named, [named])


def test_the_start_looks_at_what_is_alike():
    model = build_model()
    for block in model.model.vision_tower.encoder.layers:
        assert torch.equal(block.self_attn.q_proj.weight, block.self_attn.k_proj.weight)
    assert DENSE.gap == 0
