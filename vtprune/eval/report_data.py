"""What a report is made from: the folders that ``vtprune sweep``, ``bench`` and ``analyze`` wrote.

They are only read, and may belong to a run that still goes on.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args, get_type_hints

from vtprune.errors import ConfigError
from vtprune.eval.analyze_output import FILE as ANALYSIS
from vtprune.eval.budgets import CEILING, FLOOR, Point, split
from vtprune.eval.lmms_metrics import FILE as METRICS
from vtprune.eval.lmms_metrics import Metrics
from vtprune.eval.report_analysis import Analyzed, read_analysis
from vtprune.eval.report_bench import Bench, read_bench
from vtprune.eval.results import Settings, read_commands
from vtprune.eval.rows import Answer, R, Timing, read_rows
from vtprune.eval.samples import LMMS

RESULTS, TIMINGS, SETTINGS, BENCH = "results.jsonl", "timings.jsonl", "settings.json", "bench.json"


@dataclass(frozen=True)
class Swept:
    """What a sweep wrote; ``notes`` say what is damaged or not there yet."""

    path: Path
    settings: Settings
    answers: list[Answer]
    timings: list[Timing]
    metrics: list[Metrics]
    commands: list[str]
    notes: list[str]

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that have answers or metrics, in the order in which they were asked for."""
        found = {row.task for row in (*self.answers, *self.metrics)}
        return [task for task in split(self.settings.task) if task in found]

    @cached_property
    def points(self) -> list[Point]:
        """Ceiling, floor, then every strategy with its budgets, that which keeps most first."""
        counts: dict[Point, list[float]] = {}
        for row in (*self.answers, *self.metrics):
            counts.setdefault(row.point, []).append(row.kept)
        kept = {point: statistics.fmean(some) for point, some in counts.items()}
        first = {name: i for i, name in enumerate(dict.fromkeys(p.strategy for p in kept))}
        return sorted(
            kept, key=lambda p: (p != CEILING, p != FLOOR, first[p.strategy], -kept[p], p.budget)
        )

    def conditions(self) -> list[tuple[str, str]]:
        """Returns the settings by name, as text, but for those that are empty."""
        found = {name: str(value) for name, value in asdict(self.settings).items() if value}
        return [(name.replace("_", " "), found[name]) for name in found if name != "columns"]


@dataclass(frozen=True)
class Run:
    """What one folder holds: answers of a sweep, a benchmark, an analysis, or several of these."""

    path: Path
    swept: Swept | None
    bench: Bench | None
    analysis: Analyzed | None = None


def read_run(path: Path) -> Run:
    """Returns what is in a folder.

    Raises:
        ConfigError: there is no such folder, it holds neither answers nor a benchmark nor an
            analysis, or what it holds is damaged or does not belong together.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{path} {what}. Give a folder that vtprune sweep, bench or analyze wrote."
        )
    analysis = read_analysis(path / ANALYSIS) if (path / ANALYSIS).exists() else None
    bench = read_bench(path / BENCH) if (path / BENCH).exists() else None
    swept = _swept(path) if (path / RESULTS).exists() or (path / METRICS).exists() else None
    if swept is None and bench is None and analysis is None:
        raise ConfigError(
            f"{path} holds neither {RESULTS} nor {BENCH} nor {ANALYSIS}. Give a folder that "
            "vtprune sweep, bench or analyze wrote: their --out."
        )
    return Run(path, swept, bench, analysis)


def _swept(path: Path) -> Swept:
    settings = read_settings(path / SETTINGS)
    notes: list[str] = []
    answers = _rows(path / RESULTS, Answer, notes)
    timings = _rows(path / TIMINGS, Timing, notes)
    metrics = _rows(path / METRICS, Metrics, notes)
    if not answers and not metrics:
        raise ConfigError(
            f"{path / RESULTS} has no whole answers. {' '.join(notes) or 'It is empty.'} Sweep "
            "with the same --out, which completes it."
        )
    foreign = sorted({row.task for row in (*answers, *metrics)} - set(split(settings.task)))
    if foreign:
        raise ConfigError(
            f"{path / RESULTS} has answers to {', '.join(foreign)}, but {SETTINGS} is of a sweep "
            f"of {settings.task}. They do not belong together; sweep again into another folder."
        )
    notes += _missing(settings, answers)
    return Swept(path, settings, answers, timings, metrics, read_commands(path), notes)


def read_settings(file: Path) -> Settings:
    """Returns the settings of a sweep.

    Raises:
        ConfigError: they are not there, damaged, or not those of this version of vtprune.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read, so it cannot be told what was measured. Sweep again into "
            "another folder."
        ) from error
    hints = get_type_hints(Settings)
    kinds = {name: get_args(hint) or (hint,) for name, hint in hints.items()}
    if (
        not isinstance(found, dict)
        or found.keys() != kinds.keys()
        or any(type(found[name]) not in kinds[name] for name in kinds)
    ):
        raise ConfigError(
            f"{file} was not written by this version of vtprune, whose settings are "
            f"{', '.join(kinds)}. Report with the version that swept, or sweep again."
        )
    return Settings(**found)


def _rows(file: Path, kind: type[R], notes: list[str]) -> list[R]:
    """Returns the whole rows of a file; adds a note where there is more in it."""
    data = file.read_bytes() if file.is_file() else b""
    rows, good = read_rows(data, kind)
    if good < len(data):
        notes.append(
            f"{file.name}: what comes after line {len(rows)} is damaged or not whole, and left out."
        )
    return rows


def _missing(settings: Settings, answers: Sequence[Answer]) -> list[str]:
    """Returns a note about the points that lack answers, if there are any."""
    found = Counter((row.task, row.point) for row in answers)
    points = dict.fromkeys(row.point for row in answers)
    tasks = [task for task in split(settings.task) if not task.startswith(LMMS)]  # have their size
    every = [(task, point) for task in tasks for point in points]
    short = [pair for pair in every if found[pair] < settings.limit]
    if not short:
        return []
    some = ", ".join(f"{p.strategy} {p.budget} ({task}): {found[task, p]}" for task, p in short[:3])
    return [
        f"{len(short)} of {len(every)} points have fewer than {settings.limit} answers, such as "
        f"{some}. Differences are those on samples that both have answered."
    ]
