"""Questions about a scene, each with one right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vtprune.eval.scene_things import COLORS, DIGITS, NAMES, SHAPES, SIDES, Thing, beside, numbers

KINDS = ("read", "number", "shape", "color", "presence", "count", "relation")
WORDS = (
    *("which", "digit", "number", "shape", "is", "what", "color", "the", "there", "a", "how"),
    *("many", "digits", "shapes", "written", "just", "left", "right", "of", "above", "below"),
    *("one", "?", "yes", "no"),
)


@dataclass(frozen=True)
class Question:
    """One question with its answer: a word, or the digits of a number without blanks."""

    kind: str
    text: str
    answer: str


def all_questions(things: Sequence[Thing]) -> list[Question]:
    """Returns every question that ``things`` answer without ambiguity."""
    asked = [*_lookups(things), *_counts(things), *_relations(things)]
    present = {t.name for t in things}
    for name in NAMES:
        asked.append(Question("presence", f"is there a {name} ?", _yes(name in present)))
    written = numbers(things)
    if len(written) == 1:
        digits = "".join(t.name for t in written[0])
        asked.append(Question("number", "which number is written ?", digits))
    return asked


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in a fixed order."""
    return [*WORDS, *COLORS, *DIGITS, *SHAPES]


def _lookups(things: Sequence[Thing]) -> Iterator[Question]:
    for t in things:
        same_kind = [o for o in things if o.is_digit == t.is_digit]
        kind, noun = ("read", "digit") if t.is_digit else ("shape", "shape")
        if sum(o.color == t.color for o in same_kind) == 1:
            yield Question(kind, f"which {noun} is {t.color} ?", t.name)
        if sum(o.name == t.name for o in things) == 1:
            yield Question("color", f"what color is the {t.name} ?", t.color)


def _counts(things: Sequence[Thing]) -> Iterator[Question]:
    n_digits = sum(t.is_digit for t in things)
    for noun, n in (("digits", n_digits), ("shapes", len(things) - n_digits)):
        if n < 10:
            yield Question("count", f"how many {noun} ?", str(n))


def _relations(things: Sequence[Thing]) -> Iterator[Question]:
    in_number = {t for run in numbers(things) for t in run}
    for t in things:
        if sum(o.color == t.color for o in things) > 1:
            continue
        for side in SIDES:
            other = beside(things, t, side)
            if other is not None and other not in in_number:
                yield Question("relation", f"what is just {side} the {t.color} one ?", other.name)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
