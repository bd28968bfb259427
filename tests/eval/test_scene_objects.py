from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vtprune import ConfigError
from vtprune.eval import scene_pixels
from vtprune.eval.scene_objects import CLASSES, SIDE, SIZES, class_of, make_picture
from vtprune.eval.scene_things import COLORS, NAMES, Thing

N = len(CLASSES)


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize("split", ["train", "test"])
def test_any_so_many_pictures_in_a_row_show_each_class_once(split, first):
    labels = [make_picture(i, split).label for i in range(first, first + N)]
    assert sorted(labels) == list(range(len(NAMES) * len(COLORS)))
    few = [CLASSES[label].split() for label in labels[:28]]
    for part, values in enumerate((COLORS, NAMES)):
        counts = Counter(words[part] for words in few)
        assert len(counts) == len(values)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_one_thing_of_any_size_lies_anywhere():
    things = [make_picture(i).things for i in range(2 * N)]
    assert {len(some) for some in things} == {1}
    sizes = [thing.size for (thing,) in things]
    assert (min(sizes), max(sizes)) == SIZES
    ends = np.array([(t.x, t.y, t.x + t.size, t.y + t.size) for (t,) in things])
    assert (ends.min(0)[:2] >= 0).all()
    assert (ends.min(0)[:2] < 4).all()
    assert (ends.max(0)[2:] <= SIDE).all()
    assert (ends.max(0)[2:] > SIDE - 4).all()
    small = ends[np.array(sizes) <= 20]
    assert (small.max(0)[2:] > SIDE - 8).all()


def test_the_thing_is_seen_where_it_is_said_to_be():
    """In its color, and nowhere else; the clutter is darker than any color's strongest part."""
    for i in range(N):
        picture = make_picture(i)
        assert picture.pixels.shape == (SIDE, SIDE, 3)
        (t,) = picture.things
        far = np.abs(picture.pixels - np.array(COLORS[t.color], float)).max(-1)
        assert far[t.y : t.y + t.size, t.x : t.x + t.size].min() < 30
        far[t.y : t.y + t.size, t.x : t.x + t.size] = 255
        assert far.min() > 30


def test_in_a_crowd_nothing_touches():
    counts = []
    for i in range(20):
        things = make_picture(i, "train", crowd=40).things
        assert things[0] == make_picture(i, "train").things[0]
        taken = np.zeros((SIDE, SIDE), dtype=int)
        for t in things:
            taken[t.y : t.y + t.size, t.x : t.x + t.size] += 1
        assert taken.max() == 1
        counts.append(len(things))
    assert np.mean(counts) > 6


def test_scans_of_the_splits_are_disjoint(monkeypatch):
    """What is drawn comes from the scans of its split, which share none."""
    asked, of = [], scene_pixels._digit_masks
    monkeypatch.setattr(
        scene_pixels, "_digit_masks", lambda split: asked.append(split) or of(split)
    )
    for split in ("train", "test"):
        for i in range(N):
            make_picture(i, split)
        assert set(asked) == {split}
        asked.clear()
    train, test = ({d.tobytes() for m in of(s).values() for d in m} for s in ("train", "test"))
    assert len(train | test) == len(train) + len(test) > 1700


def test_a_picture_is_a_function_of_number_and_split():
    first, again = make_picture(5), make_picture(5)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.things == again.things
    for other in (make_picture(5, "train"), make_picture(5 + N), make_picture(5, crowd=9)):
        assert not np.array_equal(first.pixels, other.pixels)


def test_classes_are_color_and_name():
    assert CLASSES[class_of(Thing("7", "cyan", 0, 0, 0, 0))] == "cyan 7"
    assert len(set(CLASSES)) == N == 112


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, "dev"), "split='dev' is not known"),
        ((-1, "test"), "number=-1 must not be negative"),
        ((0, "test", 0), "crowd=0, but a picture shows something"),
    ],
)
def test_what_is_no_picture(args, message):
    with pytest.raises(ConfigError, match=message):
        make_picture(*args)
