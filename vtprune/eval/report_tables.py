"""The tables of a report: every point of a task, and the same by kind of question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtprune.eval.budgets import BLIND, CEILING, Point
from vtprune.eval.lmms_metrics import table_of
from vtprune.eval.plots import BASELINES
from vtprune.eval.report_data import Swept
from vtprune.eval.rows import Answer
from vtprune.eval.stats import Changes, Right, Summary, changes, summarize
from vtprune.eval.tables import HOW, cells


@dataclass(frozen=True)
class Axis:
    """What accuracy is drawn against.

    Attributes:
        name: for buttons and tables.
        label: under the axis.
        value: what a point costs; None = not known.
        log: whether equal ratios are equally far apart.
    """

    name: str
    label: str
    value: Callable[[Summary], float | None]
    log: bool = True


TOKENS = Axis(
    "tokens", "visual tokens entering a layer of the language model, mean", lambda s: s.kept
)
PATCHES = Axis("tokens", "visual tokens that are left in the end, mean", lambda s: s.kept)
FLOPS = Axis(
    "FLOPs",
    "FLOPs of the language model's prefill, % of unpruned",
    lambda s: None if s.flops is None else 100 * s.flops,
)
WORK = Axis("FLOPs", "FLOPs of the tower's blocks, % of unpruned", FLOPS.value)
TIME = Axis("time", "measured milliseconds per sample", lambda s: s.ms, log=False)

COLUMNS = (
    "strategy",
    "budget",
    "right, % [95 %]",
    "vs unpruned, points [95 %]",
    "lost",
    "gained",
    "p",
    "tokens",
    "FLOPs, %",
    "KV cache, %",
    "ms",
    "n",
    "front",
)
EXPLAINED = (
    f"unpruned is every strategy's 100 % point; blind is asked without the image. {HOW} lost and "
    "gained: samples that were right, or more so, only unpruned, and only pruned; p: McNemar's "
    "exact test of these, of each row by itself: of twenty rows without any effect one falls below "
    "0.05 by chance. "
    "tokens and FLOPs: means, of what the axes of the chart say. KV cache: its bytes after the "
    "prefill, in % of unpruned. ms: median over batches of one whole call, divided by the batch "
    "size. front: against what the point is on the Pareto front."
)


@dataclass(frozen=True)
class Row:
    """One point: its summary, how it differs from unpruned, on which axes' fronts it is."""

    summary: Summary
    changes: Changes | None
    fronts: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts, in the order of ``COLUMNS``."""
        texts, found = cells(self.summary), self.changes
        turned = (
            ("", "", "") if found is None else (str(found.lost), str(found.gained), p_text(found.p))
        )
        return (*texts[:4], *turned, *texts[4:], ", ".join(self.fronts))

    @property
    def reference(self) -> bool:
        """Whether the point is something to compare with instead of a method."""
        return self.summary.strategy in {CEILING.strategy, BLIND, *BASELINES}


@dataclass(frozen=True)
class Kind:
    """A kind of question: how many were asked, and a row per point that answers any."""

    name: str
    n: int
    rows: list[Row]

    def shares(self) -> dict[Point, tuple[float, float | None]]:
        """Right answers in %, and points to unpruned where that was asked too."""
        found = {}
        for one in (row.summary for row in self.rows):
            lost = None if one.difference is None else 100 * one.difference.value
            found[Point(one.strategy, one.budget)] = 100 * one.accuracy.value, lost
        return found


@dataclass(frozen=True)
class Line:
    """A point in the table of kinds; ``shares`` has an entry per kind, None where none answered."""

    row: Row
    shares: list[tuple[float, float | None] | None]


@dataclass(frozen=True)
class Task:
    """One task of a sweep: all its points, and the same by kind where there are several.

    ``metrics`` are the tables, header and lines by title, of what else the task counts.
    """

    name: str
    axes: list[Axis]
    rows: list[Row]
    kinds: list[Kind]
    metrics: dict[str, list[tuple[str, ...]]]

    @property
    def summaries(self) -> list[Summary]:
        return [row.summary for row in self.rows]

    @property
    def lines(self) -> list[Line]:
        """The table of kinds: a line per point."""
        by_kind = [kind.shares() for kind in self.kinds]
        points = [Point(row.summary.strategy, row.summary.budget) for row in self.rows]
        return [
            Line(row, [shares.get(point) for shares in by_kind])
            for row, point in zip(self.rows, points, strict=True)
        ]


def tasks_of(swept: Swept) -> list[Task]:
    """Returns the tables of each task that has answers."""
    return [_task(swept, name) for name in swept.tasks]


def _task(swept: Swept, name: str) -> Task:
    answers = [row for row in swept.answers if row.task == name]
    timings = [row for row in swept.timings if row.task == name]
    summaries = summarize(swept.points, answers, timings)
    axes = axes_of(summaries, sees_only=not swept.settings.max_new_tokens)
    kinds = sorted({row.kind for row in answers})
    by_kind = []
    for kind in kinds if len(kinds) > 1 else []:
        asked = [row for row in answers if row.kind == kind]
        n = len({row.sample for row in asked})
        by_kind.append(Kind(kind, n, rows_of(summarize(swept.points, asked, []), asked, [])))
    metrics = [row for row in swept.metrics if row.task == name]
    metrics.sort(key=lambda row: swept.points.index(row.point))
    parts = dict.fromkeys(part for row in metrics for part in row.values)
    counted = {part: table_of([r for r in metrics if part in r.values], part) for part in parts}
    return Task(name, axes, rows_of(summaries, answers, axes), by_kind, counted)


def axes_of(summaries: Sequence[Summary], sees_only: bool) -> list[Axis]:
    """Returns the axes for which every point has a value; ``sees_only`` models are ViTs."""
    every = [PATCHES, WORK, TIME] if sees_only else [TOKENS, FLOPS, TIME]
    every = every if summaries else []
    return [axis for axis in every if all(axis.value(s) is not None for s in summaries)]


def rows_of(
    summaries: Sequence[Summary], answers: Sequence[Answer], axes: Sequence[Axis]
) -> list[Row]:
    """Returns a row per summary; ``answers`` are those that were summarized."""
    right: dict[Point, dict[int, Right]] = {}
    for row in answers:
        right.setdefault(row.point, {})[row.sample] = row.right
    base = right.get(CEILING, {})
    fronts = {axis.name: front(summaries, axis) for axis in axes}
    found = []
    for one in summaries:
        point = Point(one.strategy, one.budget)
        paired = [i for i in right[point] if i in base] if point != CEILING else []
        ours, theirs = [right[point][i] for i in paired], [base[i] for i in paired]
        turned = changes(ours, theirs) if paired else None
        on = tuple(name for name, members in fronts.items() if one in members)
        found.append(Row(one, turned, on))
    return found


def front(summaries: Sequence[Summary], axis: Axis) -> list[Summary]:
    """Returns the points that no other is both cheaper and at least as accurate as, cheapest first.

    What was asked without the image competes with nothing.
    """

    def cost(one: Summary) -> float:
        return axis.value(one) or 0.0

    found: list[Summary] = []
    seeing = [one for one in summaries if one.strategy != BLIND]
    for one in sorted(seeing, key=lambda s: (cost(s), -s.accuracy.value)):
        best = found[-1] if found else None
        twin = best and (cost(one), one.accuracy.value) == (cost(best), best.accuracy.value)
        if best is None or twin or one.accuracy.value > best.accuracy.value:
            found.append(one)
    return found


def p_text(p: float) -> str:
    """Returns a p-value with two digits, the smallest as a bound."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"
