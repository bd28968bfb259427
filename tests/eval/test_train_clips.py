"""What the training of the video model is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vtprune.eval import shipped
from vtprune.eval.clip_questions import Track, all_questions
from vtprune.eval.clips import FPS, MOMENT, MOMENTS, SIDE, WAYS, make_clip
from vtprune.eval.mini_qwen import END, PREFIX, START
from vtprune.eval.mini_video import build_model, build_processor
from vtprune.eval.samples import TASKS, Asker, Video
from vtprune.eval.scene_things import NAMES
from vtprune.eval.train_clips import AGES, PER_MOMENT, ClipWriter, looks, targets, track_of
from vtprune.eval.train_data import BLOCK, COLOR_NAMES, IGNORE, N_BLOCKS
from vtprune.eval.train_qwen import mrope_positions
from vtprune.eval.train_video import inherit, patchify

GRID = SIDE // 8
RED, BLUE, WHITE = (COLOR_NAMES.index(color) for color in ("red", "blue", "white"))
# A 3 that turns blue in the top left, and a circle that comes in moment 5 and goes down.
STILL = tuple((0.0, 0.0) for _ in range(MOMENT * MOMENTS))
DOWN = tuple((32.0, 32.0 + 2 * i) for i in range(MOMENT * 3))
TRACKS = (
    Track("3", ("red", "blue"), 0, 4, 8, "nowhere", STILL),
    Track("circle", ("white", "white"), 5, 8, 8, "down", DOWN),
)


@pytest.fixture(scope="module")
def owner():
    return track_of(TRACKS)


def at(values, moment, row, col):
    return values[..., moment * PER_MOMENT + row * GRID + col]


def test_targets_by_hand(owner):
    found = targets(TRACKS, owner)
    three, circle = 1 + NAMES.index("3"), 1 + NAMES.index("circle")
    nowhere, down = list(WAYS).index("nowhere"), list(WAYS).index("down")
    rest = IGNORE, IGNORE, IGNORE, IGNORE
    assert at(found, 0, 0, 0).tolist() == [three, RED, IGNORE, AGES, 0, IGNORE]  # not seen to stay
    assert at(found, 3, 1, 1).tolist() == [three, RED, nowhere, AGES, 0, three]
    assert at(found, 4, 1, 1).tolist() == [three, BLUE, nowhere, AGES, 1, three]
    assert at(found, 5, 5, 5).tolist() == [circle, WHITE, IGNORE, 0, 0, 0]
    assert at(found, 7, 6, 5).tolist() == [circle, WHITE, down, 2, 0, 0]
    assert at(found, 4, 5, 5).tolist() == [0, *rest, 0]
    # It begins at row 36 + 1 in moment 6: half of the token row that ends at 40 is its.
    assert at(found[0], 6, 4, 4) == IGNORE or at(found[0], 6, 4, 4) == circle


def test_where_answers_are_seen(owner):
    found = {q.text: looks(q, TRACKS, owner).reshape(MOMENTS, -1) for q in all_questions(TRACKS)}

    def moments(text):
        return np.flatnonzero(found[text].any(1)).tolist()

    assert moments("which digit is red ?") == [0, 1, 2, 3]
    assert moments("which digit is blue ?") == [4, 5, 6, 7]
    assert moments("what color was the 3 ?") == [0, 1, 2, 3]
    assert moments("what color does the 3 become ?") == [4, 5, 6, 7]
    assert moments("which way does the 3 move ?") == [2, 3, 4, 5, 6, 7]
    assert moments("which one comes last ?") == [5, 6, 7]
    assert moments("which way does the white one move ?") == [7]
    assert moments("is there a 4 ?") == []
    corner = found["is there a 3 ?"].reshape(MOMENTS, GRID, GRID)
    assert corner[:, :2, :2].all() and corner.sum() == 4 * MOMENTS


def test_a_batch_asks_and_answers():
    tokenizer = build_processor().tokenizer
    batch = ClipWriter(tokenizer, 2)(300, (SIDE, SIDE))
    assert batch.pixels.shape == (2, 3, MOMENT * MOMENTS, SIDE, SIDE)
    assert batch.looks.shape == (2, N_BLOCKS, MOMENTS * PER_MOMENT)
    ids, labels, early = (
        x.reshape(2, N_BLOCKS, BLOCK) for x in (batch.ids, batch.labels, batch.early)
    )
    asked = labels[:, :, :-1] != IGNORE
    assert torch.equal(labels[:, :, :-1][asked], ids[:, :, 1:][asked])
    first = labels.gather(2, (labels != IGNORE).int().argmax(2, keepdim=True))
    assert ((early == IGNORE) | (early == first)).all() and (early != IGNORE).any()
    assert ((batch.kinds == IGNORE) == (ids == 0).all(-1)).all()
    assert make_clip(300, "train").questions != make_clip(300).questions


def test_clips_enter_the_model_as_its_processor_has_them():
    processor, (sample,) = build_processor(), TASKS["clips"].load(5, 6)
    assert isinstance(sample.seen, Video)
    inputs = Asker(processor)([sample.question], [sample.seen])
    pixels = torch.from_numpy(sample.seen.frames)[None].permute(0, 4, 1, 2, 3) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values_videos"], patchify(pixels))
    assert inputs["second_per_grid_ts"].tolist() == [MOMENT / FPS]
    seen = f"{START} {processor.video_token * 512} {END}"
    words = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    assert words == f"<s>user:{seen}{sample.question}assistant:".replace(" ", "")
    model: Any = build_model()
    names = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    given = {name: inputs[name] for name in names}
    positions, _ = model.model.get_rope_index(inputs["input_ids"], **given)
    n = len(PREFIX) + MOMENTS * PER_MOMENT + 1
    mine = mrope_positions(len(PREFIX), GRID, GRID, MOMENTS)
    assert torch.equal(positions[:, 0, :n], mine[:, :n])


def test_it_starts_as_mini_qwen():
    model, teacher = build_model(), shipped.load("mini-qwen")[0]
    kept = model.lm_head.weight[len(teacher.lm_head.weight) :].clone()
    inherit(model, teacher)
    n = len(teacher.lm_head.weight)
    assert torch.equal(model.lm_head.weight[:n], teacher.lm_head.weight)
    assert torch.equal(model.lm_head.weight[n:], kept) and len(kept)
    block = "visual.blocks.3.attn.qkv.weight"
    assert torch.equal(model.model.get_parameter(block), teacher.model.get_parameter(block))
