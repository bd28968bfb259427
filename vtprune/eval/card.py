"""The figures of a model card, from a sweep's folder.

    vtprune sweep --limit 1000 --strategy random --keep 25% --out runs/card
    python -m vtprune.eval.card runs/card

Prints Markdown: right answers per kind of question, seen, blind and pruned, and what was taken for
what.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vtprune.errors import ConfigError
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.rows import Answer, read_rows
from vtprune.eval.stats import accuracy, paired_difference

LARGEST = 14  # a matrix with more rows is replaced by a list


def card(rows: Sequence[Answer]) -> str:
    """Returns the tables of all ``rows``, one task's answers.

    Raises:
        ConfigError: rows of several tasks, no unpruned answers, or points of unequal length.
    """
    tasks = sorted({row.task for row in rows})
    if len(tasks) > 1:
        raise ConfigError(f"The folder holds {', '.join(tasks)}; a card is about one task.")
    seen = [row for row in rows if row.point == CEILING]
    if not seen or len(set(Counter(row.point for row in rows).values())) > 1:
        raise ConfigError("The folder lacks answers. Let the sweep finish first.")
    kinds = list(dict.fromkeys(row.kind for row in sorted(seen, key=lambda row: row.sample)))
    parts = [accuracy_table(rows, kinds)]
    parts += [confusion(kind, [row for row in seen if row.kind == kind]) for kind in kinds]
    return "\n\n".join(parts)


def accuracy_table(rows: Sequence[Answer], kinds: Sequence[str]) -> str:
    """Right answers in %, one line per kind of question and one for all, one column per point."""
    points = list(dict.fromkeys(row.point for row in rows))
    names = [f"{point.strategy} {point.budget}" for point in points]
    lines = [_line(["question", "n", *names]), "|---|" + "---:|" * (1 + len(points))]
    right = {(row.point, row.sample): row.right == 1 for row in rows}
    kind_of = {row.sample: row.kind for row in rows}
    for kind in kinds:
        mine = [i for i in kind_of if kind_of[i] == kind]
        shares = [_share(right[point, i] for i in mine) for point in points]
        lines.append(_line([kind, len(mine), *(f"{100 * share:.1f}" for share in shares)]))
    whole = [_with_interval(point, right, sorted(kind_of)) for point in points]
    return "\n".join([*lines, _line(["all", len(kind_of), *whole])])


def confusion(kind: str, rows: Sequence[Answer]) -> str:
    """What was answered (columns) for what is right (rows); a list where there are too many."""
    pairs = Counter((row.expected, row.answer) for row in rows)
    expected = sorted({right for right, _ in pairs})
    if len(expected) > LARGEST:
        wrong = [f"{a} as {b or 'nothing'}" for (a, b) in sorted(pairs) if a != b]
        return f"`{kind}`, wrong answers: {', '.join(wrong) or 'none'}."
    given = [*expected, *sorted({answer for _, answer in pairs} - set(expected))]
    lines = [_line([f"`{kind}`", *given]), "|---|" + "---:|" * len(given)]
    lines += [_line([a, *(pairs[a, b] or "" for b in given)]) for a in expected]
    return "\n".join(lines)


def _with_interval(point: Point, right: dict[tuple[Point, int], bool], samples: list[int]) -> str:
    ours = [right[point, i] for i in samples]
    found = accuracy(sum(ours), len(ours))
    text = f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    if point == CEILING:
        return text
    lost = paired_difference(ours, [right[CEILING, i] for i in samples])
    return f"{text}, {100 * lost.value:+.1f} [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]"


def _share(rights: Iterable[bool]) -> float:
    values = list(rights)
    return sum(values) / len(values)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Prints the card's tables of the folder that is given."""
    parser = argparse.ArgumentParser(description="Prints the figures of a model card.")
    parser.add_argument("folder", type=Path, help="--out of a finished sweep of one task")
    file = parser.parse_args().folder / "results.jsonl"
    if not file.exists():
        parser.error(f"{file} does not exist; run the sweep first")
    rows, _ = read_rows(file.read_bytes(), Answer)
    try:
        print(card(rows))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
