"""The benchmark of a report: ``bench.json`` as ``vtprune bench`` writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vtprune.errors import ConfigError
from vtprune.eval.bench_model_output import RATIOS, TIMES, ratios, times
from vtprune.eval.bench_model_rows import PHASES, UNPRUNED, Row, Spread

# Strategy and budget stand in front of both of the tables that bench prints.
COLUMNS = tuple(name.replace("-\n", "-").replace("\n", " ") for name in [*TIMES, *list(RATIOS)[2:]])


@dataclass(frozen=True)
class Timed:
    """A setting as a line of a table."""

    row: Row

    @property
    def label(self) -> str:
        """What it is called beside a bar."""
        return "unpruned" if self.reference else f"{self.row.strategy} {self.row.budget}"

    @property
    def reference(self) -> bool:
        """Whether nothing is pruned."""
        return self.row.strategy == UNPRUNED

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts, in the order of ``COLUMNS``."""
        return (*times(self.row), *ratios(self.row)[2:])


@dataclass(frozen=True)
class Bench:
    """What was measured, and under which conditions."""

    settings: dict[str, Any]
    rows: list[Timed]

    @property
    def model(self) -> str:
        """What was measured."""
        return str(self.settings["model"])

    @property
    def command(self) -> str:
        """The command line that was given."""
        return str(self.settings["command"])

    def groups(self) -> dict[str, list[Timed]]:
        """The rows by batch and resolution; only within these they can be compared."""
        found: dict[str, list[Timed]] = {}
        for timed in self.rows:
            row = timed.row
            name = f"batch {row.batch}, {row.resolution} pixels, {row.visual_tokens} visual tokens"
            found.setdefault(name, []).append(timed)
        return found

    def conditions(self) -> Iterator[tuple[str, str]]:
        """The settings by name, as text, but for the command and those that are empty."""
        for name, value in self.settings.items():
            if name != "command" and value not in (None, "", [], {}):
                yield name.replace("_", " "), _text(value)


def read_bench(file: Path) -> Bench:
    """Returns what is in the file.

    Raises:
        ConfigError: it cannot be read, or is not what this version of ``vtprune bench`` writes.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings, rows = dict(found["settings"]), [Timed(_row(row)) for row in found["rows"]]
        if not rows or not {"model", "command"} <= settings.keys():
            raise ValueError("it lacks rows, the model or the command")
        return Bench(settings, rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} is not what this version of vtprune bench writes ({type(error).__name__}: "
            f"{error}). Measure again, or take the file away."
        ) from error


def _row(found: dict[str, Any]) -> Row:
    hints = get_type_hints(Row)
    kinds = {
        field.name: get_args(hints[field.name]) or (hints[field.name],) for field in fields(Row)
    }
    phases = {
        name: Spread(**{k: _ms(v) for k, v in found["phases"][name].items()}) for name in PHASES
    }
    row = Row(**{**found, "phases": phases})
    for name, allowed in kinds.items():
        value = getattr(row, name)
        whole = float in allowed and type(value) is int
        if name != "phases" and type(value) not in allowed and not whole:
            raise ValueError(f"{name} is {value!r}")
    return row


def _ms(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    return value


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
