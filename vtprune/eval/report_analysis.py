"""The analysis of a report: ``analysis.json`` as ``vtprune analyze`` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from vtprune.errors import ConfigError
from vtprune.eval import analyze_output as showing
from vtprune.eval.analyze import Found
from vtprune.eval.budgets import UNPRUNED
from vtprune.eval.report_overlays import Gallery


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    cells: list[str]
    reference: bool


@dataclass(frozen=True)
class Analyzed:
    """What was seen at each point, and under which conditions."""

    settings: dict[str, Any]
    points: list[Found]
    gallery: Gallery

    @property
    def model(self) -> str:
        """What was looked into."""
        return str(self.settings["model"])

    @property
    def command(self) -> str:
        """The command line that was given."""
        return str(self.settings["command"])

    @property
    def legend(self) -> Sequence[str]:
        """What the figures mean."""
        return showing.LEGEND

    def conditions(self) -> Iterator[tuple[str, str]]:
        """The settings by name, as text, but for the command and those that are empty."""
        for name, value in self.settings.items():
            if name != "command" and value not in (None, "", [], {}):
                yield name.replace("_", " "), _text(value)

    def tables(self) -> dict[str, tuple[list[str], list[Line]]]:
        """Returns the tables by title: those by stage, then one per point by layer."""
        made = {
            title: (names, [Line(row, row[0] == UNPRUNED) for rows in points for row in rows])
            for title, (names, points) in showing.parts(self.points).items()
        }
        for found in self.points:
            last = f"; of {found.read_last} the last token was read" if found.read_last else ""
            title = (
                f"{found.strategy} {found.budget} by layer: {100 * found.right:.1f} % of "
                f"{found.n} answers right{last}"
            )
            rows = [[str(i), *showing.cells(layer)] for i, layer in enumerate(found.layers)]
            made[title] = ["layer", *showing.COLUMNS], [Line(row, False) for row in rows]
        return made


def read_analysis(file: Path) -> Analyzed:
    """Returns what is in the file.

    Raises:
        ConfigError: it cannot be read, or is not what this version of ``vtprune analyze`` writes.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        made = Analyzed(
            dict(found["settings"]),
            [_made(Found, point) for point in found["points"]],
            _made(Gallery, found["gallery"]),
        )
        if not made.points or not {"model", "command"} <= made.settings.keys():
            raise ValueError("it lacks points, the model or the command")
        for of in (of for point in made.points for of in point.maps):
            np.array(of.share).reshape(of.grid)
        return made
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} is not what this version of vtprune analyze writes ({type(error).__name__}: "
            f"{error}). Analyze again, or take the file away."
        ) from error


def _made(kind: Any, value: Any) -> Any:
    """Returns ``value``, as JSON has it, as ``kind``: a dataclass, or of plain types."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise ValueError(f"no {kind.__name__}: {str(value)[:60]}")
        return kind(**{name: _made(hint, value[name]) for name, hint in hints.items()})
    args = get_args(kind)
    if get_origin(kind) is list and isinstance(value, list):
        return [_made(args[0], one) for one in value]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_made(arg, one) for arg, one in zip(args, value, strict=True))
    if get_origin(kind) is UnionType:
        nothing = value is None and type(None) in args
        fits = [arg for arg in args if arg is type(value) or is_dataclass(arg)]
        return None if nothing else _made(fits[0] if fits else float, value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:60]!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
