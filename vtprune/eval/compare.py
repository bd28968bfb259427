"""One strategy against another on the same samples of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from vtprune.errors import ConfigError
from vtprune.eval.budgets import CEILING, FLOOR, Point
from vtprune.eval.rows import Answer, read_rows
from vtprune.eval.stats import Interval, paired_difference
from vtprune.eval.tables import points_text
from vtprune.registry import unknown

Rows = dict[tuple[str, int], Answer]


@dataclass(frozen=True)
class Difference:
    """Right answers of a point less those of the baseline at the same budget, -1 to 1.

    ``kinds`` has the same by kind of question; all on the ``n`` samples that both answered.
    """

    point: Point
    n: int
    all: Interval
    kinds: dict[str, float]


def read_answers(folder: Path, kinds: Sequence[str] = ()) -> list[Answer]:
    """Returns the answers of a sweep's folder, to questions of these kinds or of all.

    Raises:
        ConfigError: it holds none, or none of a kind.
    """
    file = folder / "results.jsonl"
    rows = read_rows(file.read_bytes(), Answer)[0] if file.is_file() else []
    if not rows:
        raise ConfigError(f"{folder} holds no answers of a sweep. Give the --out of one.")
    known = sorted({row.kind for row in rows})
    for kind in kinds:
        if kind not in known:
            raise unknown("kind of question", kind, known)
    return [row for row in rows if not kinds or row.kind in kinds]


def differences(answers: Sequence[Answer], baseline: str) -> list[Difference]:
    """Compares each point with ``baseline`` at the same budget, in the order of the answers.

    Raises:
        ConfigError: the baseline has no answers, or none at a budget that others have.
    """
    rows: dict[Point, Rows] = {}
    for answer in answers:
        rows.setdefault(answer.point, {})[answer.task, answer.sample] = answer
    ours = [p for p in rows if p not in (CEILING, FLOOR) and p.strategy != baseline]
    known = sorted({point.strategy for point in rows})
    if baseline not in known:
        raise ConfigError(f"{baseline!r} has no answers here; choose one of {', '.join(known)}.")
    single = [point for point in rows if point.strategy == baseline]
    found = []
    for point in ours:
        base = single[0] if single[0] in (CEILING, FLOOR) else Point(baseline, point.budget)
        if base not in rows:
            raise ConfigError(f"{baseline} has no answers at {point.budget}; sweep it there too.")
        found.append(_difference(point, rows[point], rows[base]))
    return found


def _difference(point: Point, ours: Rows, base: Rows) -> Difference:
    both = [(ours[key], base[key]) for key in ours if key in base]
    if not both:
        raise ConfigError(f"{point.strategy} and its baseline share no sample at {point.budget}.")
    kinds = sorted({a.kind for a, _ in both})
    return Difference(
        point,
        len(both),
        _paired(both),
        {kind: _paired([pair for pair in both if pair[0].kind == kind]).value for kind in kinds},
    )


def _paired(both: Sequence[tuple[Answer, Answer]]) -> Interval:
    return paired_difference([a.right for a, _ in both], [b.right for _, b in both])


def table(found: Sequence[Difference], baseline: str) -> Table:
    """Returns the table for the terminal: points of accuracy, all with their 95 % interval."""
    shown = Table(title=Text(title(baseline)), box=box.SIMPLE, padding=0)
    for i, name in enumerate(header(found)):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for one in found:
        shown.add_row(*cells(one))
    return shown


def markdown(found: Sequence[Difference], baseline: str) -> str:
    """Returns the same in Markdown."""
    names = header(found)
    lines = [names, ("---", *["---:"] * (len(names) - 1)), *map(cells, found)]
    return f"{title(baseline)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def title(baseline: str) -> str:
    """Returns what the table says."""
    return f"Right answers less those of {baseline}, points; all [95 %], then by kind of question"


def header(found: Sequence[Difference]) -> tuple[str, ...]:
    """Returns the names of the columns."""
    return ("strategy", "budget", "n", "all", *(found[0].kinds if found else ()))


def cells(one: Difference) -> tuple[str, ...]:
    """Returns the texts of one row, in the order of ``header``."""
    kinds = (f"{100 * value:+.1f}" for value in one.kinds.values())
    return (one.point.strategy, one.point.budget, str(one.n), points_text(one.all, "+"), *kinds)
