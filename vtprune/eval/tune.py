"""Tuning: search settings on a part of the samples, confirm on the others, write the best one.

What is measured goes into the folder of a sweep, so a run that was stopped is resumed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vtprune.errors import ConfigError
from vtprune.eval.budgets import CEILING, FLOOR, Point, parse_budget
from vtprune.eval.results import Folder, Settings
from vtprune.eval.rows import Answer
from vtprune.eval.stats import paired_difference
from vtprune.eval.sweep import Sweep
from vtprune.eval.tune_search import Goal, MaxDrop, MaxMs, Round, Seen, confirm, search, sizes
from vtprune.eval.tune_stats import Paired, upper_limit
from vtprune.registry import read
from vtprune.setting import Setting

FILE = "tuned.yaml"
# Tried by default: without trained weights of their own, but for those that models come with.
STRATEGIES = (
    *("strided", "fastervlm", "divprune", "visionzip", "hiprune", "tome"),
    *("fastv", "transprune", "visiondrop", "dyvte", "shortv", "shortv(replaced=9)", "saisa"),
)
LADDER = ("75%", "50%", "35%", "25%", "15%", "10%")


@dataclass(frozen=True)
class Parts:
    """Which samples of each task the search sees, and which are kept for the test."""

    search: int
    limit: int
    n_tasks: int
    batch: int

    @classmethod
    def of(cls, limit: int, n_tasks: int, batch: int) -> Parts:
        """Splits ``limit`` samples per task: a third is searched on, in whole batches.

        Raises:
            ConfigError: there are not two batches.
        """
        if limit < 2 * batch:
            raise ConfigError(
                f"--limit {limit} is less than two batches of {batch}: one to search on, one to "
                "test on. Give more, or a smaller --batch-size."
            )
        return cls(max(1, limit // 3 // batch) * batch, limit, n_tasks, batch)

    @property
    def fresh(self) -> int:
        """Samples of the test, all tasks together."""
        return (self.limit - self.search) * self.n_tasks

    def answers(self, n_points: int) -> int:
        """Returns how many answers a run takes at most, those of the unpruned model included."""
        looks, entered = [], n_points
        for stay, size in sizes(n_points, self.search, self.batch):
            looks.append((entered + 1) * size)
            entered = min(stay, entered)
        return self.n_tasks * (sum(looks) + 2 * self.search + 2 * entered * self.limit)

    def check(self, goal: Goal) -> None:
        """Raises ConfigError where the test has too few samples to confirm anything."""
        batches = (self.limit - self.search) // self.batch * self.n_tasks
        try:
            goal.check(self.fresh, batches)
        except ConfigError as error:
            raise ConfigError(
                f"{error} Of --limit {self.limit} the search takes {self.search}; give a larger "
                "--limit, or another bound."
            ) from None


class Tables:
    """Measures settings beside the unpruned model, where the folder does not hold that yet."""

    def __init__(self, sweep: Sweep, folder: Folder, advance: Callable[[int], None]) -> None:
        self.sweep, self.folder, self.advance = sweep, folder, advance

    def __call__(self, points: Sequence[Point], first: int, end: int) -> list[Seen]:
        self.measure((CEILING, *points), end)
        return [self._seen(point, first, end) for point in points]

    def measure(self, points: Sequence[Point], end: int) -> None:
        """Measures these points on the first ``end`` samples of each task."""
        part = copy.copy(self.sweep)
        part.points = tuple(points)
        part.settings = replace(part.settings, limit=end)
        part.run(self.folder, self.advance)

    def answers(self, point: Point, first: int, end: int) -> dict[tuple[str, int], Answer]:
        """Returns the answers to these samples by task and number."""
        rows = self.folder.answers.rows
        mine = [row for row in rows if row.point == point and first <= row.sample < end]
        return {(row.task, row.sample): row for row in mine}

    def _seen(self, point: Point, first: int, end: int) -> Seen:
        ours, base = self.answers(point, first, end), self.answers(CEILING, first, end)
        pairs = [(ours[key].right, base[key].right) for key in base]
        lost, gained = pairs.count((False, True)), pairs.count((True, False))
        shares = [row.flops for row in ours.values() if row.flops is not None]
        return Seen(
            point,
            Paired(len(pairs), lost, gained),
            len([right for right, _ in pairs if right]),
            statistics.fmean(shares) if len(shares) == len(pairs) else None,
            self._times(point, first, end),
            self._times(CEILING, first, end),
        )

    def _times(self, point: Point, first: int, end: int) -> tuple[float, ...]:
        """Returns ms per sample of each whole batch."""
        size = self.sweep.settings.batch_size
        rows = [row for row in self.folder.timings.rows if row.point == point and row.size == size]
        return tuple(row.ms / size for row in rows if first <= row.first <= end - size)


@dataclass(frozen=True)
class Outcome:
    """What a run found: ``tested`` settings in turn and whether each was shown to hold the bound.

    ``blind`` is the share of right answers without images, on the samples of the search, and
    ``sees`` whether those of the unpruned model are shown to be more; None for ViTs.
    """

    tested: list[tuple[Seen, bool]]
    blind: float | None
    sees: bool | None

    @property
    def best(self) -> Seen | None:
        """The last that holds the bound."""
        return next((seen for seen, holds in reversed(self.tested) if holds), None)


def tune(
    sweep: Sweep,
    folder: Folder,
    goal: Goal,
    parts: Parts,
    told: Callable[[Round], None],
    advance: Callable[[int], None],
) -> Outcome:
    """Searches the sweep's points, and tests the best ones on fresh samples."""
    tables = Tables(sweep, folder, advance)
    points = [point for point in sweep.points if point not in (CEILING, FLOOR)]
    if not points:
        raise ConfigError("No setting fits this model. Give other strategies or budgets.")
    found = search(points, tables, goal, parts.search, parts.batch, parts.fresh, told)
    blind, sees = None, None
    if FLOOR in sweep.points:
        tables.measure((CEILING, FLOOR), parts.search)
        blind, sees = _sight(tables, parts.search)
    return Outcome(confirm(found, tables, goal, parts.search, parts.limit), blind, sees)


def _sight(tables: Tables, end: int) -> tuple[float, bool]:
    """Returns right answers without images, a share, and whether those with them are more."""
    blind, base = tables.answers(FLOOR, 0, end), tables.answers(CEILING, 0, end)
    rights = [blind[key].right for key in base]
    gap = paired_difference([base[key].right for key in base], rights)
    return statistics.fmean(rights), gap.low > 0


def setting_of(seen: Seen, outcome: Outcome, goal: MaxDrop | MaxMs, settings: Settings) -> Setting:
    """Returns the setting of a point, with what was measured on the fresh samples.

    Shares are in per cent, drops in points of accuracy, times in ms per sample.
    """
    name, options = read(seen.point.strategy)
    budget = {} if seen.point.budget == "100%" else parse_budget(seen.point.budget)
    kept = ("model", "fingerprint", "task", "hint", "batch_size", "seed", "device", "versions")
    conditions = {key: value for key, value in asdict(settings).items() if key in kept}
    return Setting(name, options, measured=facts(seen, outcome, goal) | conditions, **budget)


def facts(seen: Seen, outcome: Outcome, goal: MaxDrop | MaxMs) -> dict[str, Any]:
    """Returns the figures of the test, rounded to what a file should have."""
    n, limit = seen.paired.n, upper_limit(seen.paired, goal.confidence)
    bound = {"max_drop": 100 * goal.bound} if isinstance(goal, MaxDrop) else {"max_ms": goal.bound}
    known = {
        "right": 100 * seen.right / n,
        "unpruned_right": 100 * seen.unpruned_right / n,
        "blind_right": None if outcome.blind is None else 100 * outcome.blind,
        "drop": 100 * seen.paired.drop,
        "drop_at_most": 100 * limit,
        "flops": None if seen.flops is None else 100 * seen.flops,
        "ms": seen.median_ms if seen.ms else None,
        "unpruned_ms": statistics.median(seen.unpruned_ms) if seen.unpruned_ms else None,
    }
    counts = {"samples": n, "lost": seen.paired.lost, "gained": seen.paired.gained}
    said = {key: round(value, 2) for key, value in known.items() if value is not None}
    return {**bound, "confidence": goal.confidence, **counts, **said}
