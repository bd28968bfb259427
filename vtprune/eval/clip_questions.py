"""Questions about a clip, each with one right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vtprune.eval.scene_questions import Question
from vtprune.eval.scene_questions import vocabulary as of_scenes
from vtprune.eval.scene_things import DIGITS, NAMES

KINDS = ("read", "shape", "color", "presence", "motion", "order", "change")
WORDS = ("way", "does", "move", "up", "down", "nowhere", "comes", "last", "become", "was")


@dataclass(frozen=True)
class Track:
    """A thing in a clip, its times in moments.

    Attributes:
        colors: until ``turn`` and from then on; equal where it never changes.
        first, end: it is there from ``first`` to before ``end``.
        way: in which it moves, or nowhere.
        places: its top-left corner (x, y) in pixels, in each frame in which it is there.
    """

    name: str
    colors: tuple[str, str]
    first: int
    turn: int
    end: int
    way: str
    places: tuple[tuple[float, float], ...]

    @property
    def changes(self) -> bool:
        return self.colors[0] != self.colors[1]

    def place(self, frame: int) -> tuple[float, float] | None:
        """Returns where it is in a frame (0-based), None where it is not there."""
        per_moment = len(self.places) // (self.end - self.first)
        known = frame - self.first * per_moment
        return self.places[known] if 0 <= known < len(self.places) else None


def all_questions(tracks: Sequence[Track]) -> list[Question]:
    """Returns every question that ``tracks`` answer; all names and colors are of one thing."""
    present = {track.name for track in tracks}
    asked = [question for track in tracks for question in _about(track)]
    asked += [Question("presence", f"is there a {n} ?", _yes(n in present)) for n in NAMES]
    latest = max(track.first for track in tracks)
    asked += [
        Question("order", "which one comes last ?", track.name)
        for track in tracks
        if track.first == latest
    ]
    return asked


def vocabulary() -> list[str]:
    """Words that questions about scenes lack."""
    return [word for word in WORDS if word not in of_scenes()]


def _about(track: Track) -> Iterator[Question]:
    kind, noun = ("read", "digit") if track.name in DIGITS else ("shape", "shape")
    for color in dict.fromkeys(track.colors):
        yield Question(kind, f"which {noun} is {color} ?", track.name)
    yield Question("motion", f"which way does the {track.name} move ?", track.way)
    if track.changes:
        yield Question("change", f"what color does the {track.name} become ?", track.colors[1])
        yield Question("change", f"what color was the {track.name} ?", track.colors[0])
    else:
        yield Question("color", f"what color is the {track.name} ?", track.colors[0])
        yield Question("motion", f"which way does the {track.colors[0]} one move ?", track.way)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
