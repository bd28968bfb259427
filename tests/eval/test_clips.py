from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vtprune import ConfigError
from vtprune.eval.clip_questions import KINDS, Track, all_questions, vocabulary
from vtprune.eval.clips import (
    FRAMES,
    LEAST_LIFE,
    MOMENT,
    MOMENTS,
    NEAR,
    SIDE,
    WAYS,
    make_clip,
    pick_question,
)
from vtprune.eval.mini_video import build_tokenizer
from vtprune.eval.scene_things import CELL, COLORS

N = 40


@pytest.fixture(scope="module")
def clips():
    return [make_clip(seed) for seed in range(N)]


def track(name, colors, first, turn, end, way, start=(0.0, 0.0)):
    step = np.array(WAYS[way])
    places = tuple(tuple(np.array(start) + i * step) for i in range(MOMENT * (end - first)))
    return Track(name, colors, first, turn, end, way, places)


def test_answers_by_hand():
    tracks = [
        track("3", ("red", "blue"), 0, 4, 8, "left"),
        track("circle", ("white", "white"), 2, 6, 6, "nowhere"),
    ]
    found = {question.text: question.answer for question in all_questions(tracks)}
    assert found["which digit is red ?"] == found["which digit is blue ?"] == "3"
    assert found["which shape is white ?"] == "circle"
    assert found["what color does the 3 become ?"] == "blue"
    assert found["what color was the 3 ?"] == "red"
    assert found["what color is the circle ?"] == "white"
    assert found["which way does the 3 move ?"] == "left"
    assert found["which way does the white one move ?"] == "nowhere"
    assert found["which one comes last ?"] == "circle"
    assert found["is there a 3 ?"] == "yes" and found["is there a 4 ?"] == "no"
    # What has two answers is not asked.
    assert "what color is the 3 ?" not in found
    assert "which way does the red one move ?" not in found


def test_a_thing_is_there_in_its_moments_alone():
    moving = track("3", ("red", "red"), 2, 6, 6, "right", (5.0, 7.0))
    assert moving.place(3) is None and moving.place(12) is None
    assert moving.place(4) == (5.0, 7.0) and moving.place(11) == (12.0, 7.0)


def test_a_clip_is_a_function_of_its_number_and_split(clips):
    again = make_clip(3)
    assert (again.frames == clips[3].frames).all() and again.questions == clips[3].questions
    assert (make_clip(4).frames != again.frames).any()
    assert (make_clip(3, "train").frames != again.frames).any()


def test_things_stay_inside_apart_and_long_enough(clips):
    for clip in clips:
        assert clip.frames.shape == (FRAMES, SIDE, SIDE, 3)
        for one in clip.tracks:
            assert one.end - one.first >= LEAST_LIFE and one.end <= MOMENTS
            assert len(one.places) == MOMENT * (one.end - one.first)
            assert np.min(one.places) >= 0 and np.max(one.places) <= SIDE - CELL
            moved = np.subtract(one.places[-1], one.places[0])
            assert (np.sign(moved) == WAYS[one.way]).all()
        for frame in range(FRAMES):
            there = [place for one in clip.tracks if (place := one.place(frame))]
            for i, a in enumerate(there):
                assert all(np.abs(np.subtract(a, b)).max() >= NEAR for b in there[:i])


def test_every_kind_of_question_can_be_asked(clips):
    for clip in clips:
        assert {question.kind for question in clip.questions} == set(KINDS)
        texts = [question.text for question in clip.questions]
        assert len(texts) == len(set(texts))
    asked = [pick_question(clip, i) for i, clip in enumerate(clips)]
    assert [question.kind for question in asked] == [KINDS[i % len(KINDS)] for i in range(N)]
    said = Counter(pick_question(clip, i, "presence").answer for i, clip in enumerate(clips))
    assert said == {"yes": N // 2, "no": N // 2}


def test_things_are_seen_where_and_when_they_are(clips):
    """In its box a frame differs from the same clip's frame without the thing: its background."""
    seen = 0
    for clip in clips:
        for one in clip.tracks:
            if one.first == 0:
                continue
            (x, y), (red, green, blue) = one.places[0], COLORS[one.colors[0]]
            box = slice(round(y), round(y) + CELL), slice(round(x), round(x) + CELL)
            before, after = (
                clip.frames[one.first * MOMENT + step][box].astype(float) for step in (-1, 0)
            )
            near = [np.abs(f - (red, green, blue)).max(-1) < 60 for f in (before, after)]
            others = [t for t in clip.tracks if t is not one and t.place(one.first * MOMENT - 1)]
            if all(
                np.abs(np.subtract(t.place(one.first * MOMENT - 1), (x, y))).max() >= CELL
                for t in others
            ):
                assert near[0].mean() < 0.05 < near[1].mean()
                seen += 1
    assert seen > N // 2


def test_a_color_changes_at_its_moment(clips):
    for clip in clips:
        (one,) = (t for t in clip.tracks if t.changes)
        for moment, color in ((one.turn - 1, one.colors[0]), (one.turn, one.colors[1])):
            x, y = one.place(moment * MOMENT)
            box = clip.frames[
                moment * MOMENT, round(y) : round(y) + CELL, round(x) : round(x) + CELL
            ]
            assert (np.abs(box.astype(float) - COLORS[color]).max(-1) < 60).mean() > 0.05


def test_the_model_knows_every_word(clips):
    tokenizer = build_tokenizer()
    for clip in clips:
        for question in clip.questions:
            ids = tokenizer(f"{question.text} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(question.text.split()) + 1
    assert vocabulary() == list(dict.fromkeys(vocabulary()))


@pytest.mark.parametrize(("seed", "split"), [(-1, "test"), (0, "valid")])
def test_refuses(seed, split):
    with pytest.raises(ConfigError):
        make_clip(seed, split)
