from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vtprune import ConfigError
from vtprune.eval.scene_pixels import _digit_masks
from vtprune.eval.scene_questions import KINDS, all_questions, vocabulary
from vtprune.eval.scene_things import CELL, SIZE, Thing, beside, numbers
from vtprune.eval.scenes import DENSE, LEVELS, make_scene, pick_question

N = 60


def thing(name, color, row, col):
    return Thing(name, color, row, col, col * CELL, row * CELL)


# The row 1 holds the number 407 and a blue circle; a red 7 lies below its 4.
THINGS = (
    thing("4", "green", 1, 0),
    thing("0", "green", 1, 1),
    thing("7", "green", 1, 2),
    thing("circle", "blue", 1, 4),
    thing("7", "red", 3, 0),
    thing("cross", "red", 3, 2),
)


def answers(things=THINGS):
    return {question.text: question.answer for question in all_questions(things)}


def test_answers_by_hand():
    found = answers()
    assert found["which number is written ?"] == "407"
    assert found["which digit is red ?"] == "7"
    assert found["which shape is red ?"] == "cross"
    assert found["what color is the 4 ?"] == "green"
    assert found["what color is the circle ?"] == "blue"
    assert found["how many digits ?"] == "4"
    assert found["how many shapes ?"] == "2"
    assert found["is there a 7 ?"] == "yes"
    assert found["is there a square ?"] == "no"


def test_what_is_ambiguous_is_not_asked():
    found = answers()
    assert "what color is the 7 ?" not in found  # there are two
    assert "which digit is green ?" not in found  # there are three
    assert "what is just left of the red one ?" not in found  # two are red
    assert "what is just left of the blue one ?" not in found  # a digit of the number
    assert "which number is written ?" not in answers((*THINGS, *moved_number()))


def moved_number():
    return (thing("1", "white", 6, 4), thing("2", "white", 6, 5))


def test_relations_reach_two_cells():
    apart = [thing("3", "cyan", 0, 0), thing("circle", "blue", 0, 2), thing("5", "red", 0, 5)]
    found = answers(apart)
    assert found["what is just right of the cyan one ?"] == "circle"
    assert found["what is just left of the blue one ?"] == "3"
    assert "what is just right of the blue one ?" not in found
    assert beside(apart, apart[2], "left of") is None
    below = [thing("3", "cyan", 0, 0), thing("8", "red", 1, 0), thing("9", "blue", 2, 0)]
    assert answers(below)["what is just below the cyan one ?"] == "8"
    assert answers(below)["what is just above the blue one ?"] == "8"


def test_numbers_are_runs_of_one_color():
    row = [thing(n, c, 0, i) for i, (n, c) in enumerate(zip("12345", "rrgrr", strict=True))]
    assert [[t.name for t in run] for run in numbers(row)] == [["1", "2"], ["4", "5"]]
    assert numbers([thing("1", "red", 0, 0), thing("2", "red", 0, 2)]) == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_scene_allows_every_task(level, split):
    for seed in range(N):
        scene = make_scene(seed, split, level)
        assert scene.pixels.shape == (SIZE, SIZE, 3)
        assert {q.kind for q in scene.questions} == set(KINDS)
        assert len({q.text for q in scene.questions}) == len(scene.questions)
        assert set(answers(scene.things).items()) == {(q.text, q.answer) for q in scene.questions}


@pytest.mark.parametrize("level", [*LEVELS, DENSE])
def test_things_stay_apart_and_inside(level):
    gap = (LEVELS[level] if isinstance(level, str) else level).gap
    for seed in range(N):
        things = make_scene(seed, "test", level).things
        joined = {t: i for i, run in enumerate(numbers(things)) for t in run}
        for i, a in enumerate(things):
            assert 0 <= a.x <= SIZE - CELL
            assert 0 <= a.y <= SIZE - CELL
            for b in things[:i]:
                if a not in joined or joined[a] != joined.get(b):
                    assert max(abs(a.row - b.row), abs(a.col - b.col)) > gap


def test_levels_get_harder():
    things = {
        level: np.mean([len(make_scene(seed, "test", level).things) for seed in range(N)])
        for level in LEVELS
    }
    assert things["easy"] + 1 < things["standard"] < things["hard"] - 1
    colors = {
        level: [make_scene(seed, "test", level).things for seed in range(N)] for level in LEVELS
    }
    shared = {level: sum(map(shares_a_color, scenes)) for level, scenes in colors.items()}
    assert shared["easy"] == shared["standard"] == 0 < shared["hard"]


def shares_a_color(things):
    in_number = {t for run in numbers(things) for t in run}
    singles = Counter(t.color for t in things if t not in in_number)
    return any(n > 1 for n in singles.values())


def test_a_scene_is_a_function_of_its_seed():
    first, again = make_scene(5, "test", "hard"), make_scene(5, "test", "hard")
    assert np.array_equal(first.pixels, again.pixels)
    assert first.questions == again.questions
    others = [make_scene(6, "test", "hard"), make_scene(5, "train", "hard"), make_scene(5)]
    assert not any(np.array_equal(first.pixels, other.pixels) for other in others)


def test_train_and_test_digits_are_disjoint():
    train, test = ({d.tobytes() for m in _digit_masks(s).values() for d in m} for s in SPLITS)
    assert len(train) > 1000
    assert len(test) > 500
    assert not train & test


SPLITS = ("train", "test")


def test_tasks_take_turns_and_no_answer_dominates():
    picked = [pick_question(make_scene(seed), seed) for seed in range(70 * len(KINDS))]
    by_task = {task: Counter(q.answer for q in picked if q.kind == task) for task in KINDS}
    assert {sum(counts.values()) for counts in by_task.values()} == {70}
    best = {task: max(counts.values()) / 70 for task, counts in by_task.items()}
    assert best["presence"] == 0.5
    assert all(share < 0.45 for task, share in best.items() if task != "presence")
    assert pick_question(make_scene(0), 0, "count").kind == "count"


def test_every_word_is_in_the_vocabulary():
    words = set(vocabulary())
    assert len(words) == len(vocabulary())
    for level in LEVELS:
        for question in make_scene(1, "test", level).questions:
            assert set(question.text.split()) <= words
            assert set(question.answer if question.kind == "number" else [question.answer]) <= words


@pytest.mark.parametrize(
    ("args", "said"),
    [((0, "dev"), "split='dev'"), ((-1,), "seed=-1"), ((0, "test", "medium"), "level='medium'")],
)
def test_bad_arguments(args, said):
    with pytest.raises(ConfigError, match=said):
        make_scene(*args)
