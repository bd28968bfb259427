"""Tasks of the shipped ViTs: pictures to classify, pictures and captions to find each other."""

from __future__ import annotations

from functools import partial

from vtprune.eval.samples import Sample, Task
from vtprune.eval.scene_captions import make_pair
from vtprune.eval.scene_objects import CLASSES, make_picture


def load_objects(first: int, end: int) -> list[Sample]:
    """Returns held-out pictures of one thing; expected is its class."""
    made = []
    for index in range(first, end):
        picture = make_picture(index)
        kind = "digit" if picture.things[0].is_digit else "shape"
        made.append(Sample("objects", index, kind, picture.image, "", CLASSES[picture.label]))
    return made


def load_pairs(task: str, first: int, end: int) -> list[Sample]:
    """Returns held-out pairs; the question is the caption, expected the pair's number."""
    made = []
    for index in range(first, end):
        pair = make_pair(index)
        kind = f"{len(pair.picture.things)} things"
        made.append(Sample(task, index, kind, pair.picture.image, pair.caption, str(index)))
    return made


def _recall(name: str, what: str) -> Task:
    return Task(name, what, partial(load_pairs, name))


def _named(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


# Recall at k: whether what belongs to it is among the k that are most alike.
SOUGHT = {"text-at-1": 1, "text-at-5": 5, "image-at-1": 1, "image-at-5": 5}
VIT_TASKS = {
    "mini-vit": _named(Task("objects", "top-1 of held-out pictures, 112 classes", load_objects)),
    "mini-clip": _named(
        _recall("text-at-1", "whether a picture finds its caption among all (--limit) captions"),
        _recall("text-at-5", "the same, among the first 5"),
        _recall("image-at-1", "whether a caption finds its picture among all (--limit) pictures"),
        _recall("image-at-5", "the same, among the first 5"),
    ),
}
