"""Recorded cases of the authors' code: finding, loading, and checking them against an adapter.

A case is ``<case>.json`` (method, parameters, meaning of each tensor) beside
``<case>.safetensors`` (``in.*`` and ``out.*``). ``golden_adapters/<method>.py`` defines
``from_golden(params, tensors)``, which drives the package and returns every ``out.*``. A case of a
formula has no tensors but ``cases``, rows of named numbers: its adapter defines
``from_golden(params, row)`` and returns the numbers that follow from those it reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

Output = Tensor | tuple[Tensor, Tensor]  # ours, or (ours, recorded) after a normalisation
Adapter = Callable[[dict[str, Any], Any], Mapping[str, Any]]

RELATIVE = 1e-4  # of the recorded value
FLOOR = 1e-5  # of the largest recorded value


class GoldenError(AssertionError):
    """A case that cannot be run, or that our code does not reproduce."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a case; remembers which inputs were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[name]
        self._used.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def ignore(self, name: str, reason: str) -> None:
        """Declares that the method does not read the input ``name``.

        Raises:
            GoldenError: no such input, one that was read, or no reason.
        """
        if name not in self._tensors or not name.startswith("in."):
            raise GoldenError(f"ignore({name!r}): the case has no such input.")
        if name in self._used:
            raise GoldenError(f"ignore({name!r}): it was read.")
        if not reason.strip():
            raise GoldenError(f"ignore({name!r}) needs a reason.")
        self._used.add(name)

    def unread(self) -> list[str]:
        return sorted(n for n in self._tensors if n.startswith("in.") and n not in self._used)

    def outputs(self) -> set[str]:
        return {name for name in self._tensors if name.startswith("out.")}


class Row(Mapping[str, Any]):
    """The numbers of one row of a formula; remembers which were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._used.add(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> set[str]:
        """Names of what was not read, but for texts."""
        texts = {name for name, value in self._values.items() if isinstance(value, str)}
        return set(self._values) - self._used - texts


@dataclass(frozen=True)
class Case:
    """One recorded case; ``path`` is its json file, ``rows`` those of a formula."""

    path: Path
    method: str
    params: dict[str, Any]
    declared: frozenset[str]
    rows: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.method}/{self.path.stem}"

    def tensors(self) -> dict[str, Tensor]:
        """Loads the tensors.

        Raises:
            GoldenError: the file is missing, or holds other tensors than the json declares.
        """
        path = self.path.with_suffix(".safetensors")
        if not path.exists():
            if self.declared:
                raise GoldenError(f"{path} is missing.")
            return {}
        tensors = load_file(path)
        if set(tensors) != self.declared:
            odd = sorted(set(tensors) ^ self.declared)
            raise GoldenError(f"{self.path} and its tensors disagree on: {', '.join(odd)}.")
        return tensors


def find_cases(folder: Path) -> list[Case]:
    """Returns all cases in ``folder`` and below, in order of their paths.

    Raises:
        GoldenError: no such folder, no case in it, or a case that is not complete.
    """
    if not folder.is_dir():
        raise GoldenError(f"--golden {folder}: no such folder.")
    cases = [_read(path) for path in sorted(folder.rglob("*.json"))]
    found = [case for case in cases if case is not None]
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.with_suffix(".json").exists():
            raise GoldenError(f"{path} has no json beside it.")
    if not found:
        raise GoldenError(f"--golden {folder}: no case in it (<case>.json + <case>.safetensors).")
    return found


def _read(path: Path) -> Case | None:
    """Reads one json; None when it neither names a method nor has tensors beside it."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GoldenError(f"{path} is not valid json: {error}") from error
    method = meta.get("method") if isinstance(meta, dict) else None
    if not isinstance(method, str):
        if path.with_suffix(".safetensors").exists():
            raise GoldenError(f"{path} names no method.")
        return None
    rows = tuple(meta.get("cases", ()))
    return Case(path, method, meta.get("params", {}), frozenset(meta.get("tensors", {})), rows)


def find_adapter(method: str) -> Adapter:
    """Returns the adapter of ``method``.

    Raises:
        GoldenError: there is none.
    """
    name = f"tests.golden_adapters.{method}"
    if not method.isidentifier() or importlib.util.find_spec(name) is None:
        raise GoldenError(f"{method!r} has no adapter: write golden_adapters/{method}.py.")
    return importlib.import_module(name).from_golden


def check(case: Case, adapter: Adapter) -> None:
    """Runs ``adapter`` on ``case``.

    Raises:
        GoldenError: an input unread, an output missing, unknown or different.
    """
    recorded = case.tensors()
    if not any(name.startswith("out.") for name in recorded) and not case.rows:
        raise GoldenError(f"{case.name} records nothing that could be compared.")
    if case.rows:
        return _check_rows(case, adapter)
    tensors = Tensors(recorded)
    ours = adapter(case.params, tensors)
    problems = [f"{name} was neither read nor ignored" for name in tensors.unread()]
    problems += [f"{name} was not checked" for name in sorted(tensors.outputs() - set(ours))]
    for name, value in ours.items():
        if name not in tensors.outputs():
            problems.append(f"{name} is not in the case")
            continue
        got, want = value if isinstance(value, tuple) else (value, recorded[name])
        problems += _differences(name, got, want)
    if problems:
        raise GoldenError(f"{case.name}: " + "; ".join(problems) + ".")


def _check_rows(case: Case, adapter: Adapter) -> None:
    """Compares numbers exactly, but for what the last bits of a fraction lose in another order."""
    problems = []
    for i, recorded in enumerate(case.rows):
        row = Row(recorded)
        ours = adapter(case.params, row)
        problems += [
            f"row {i}: {name} was neither read nor answered"
            for name in sorted(row.unread() - ours.keys())
        ]
        for name, got in ours.items():
            want = recorded.get(name, math.nan)
            exact = isinstance(got, int) and isinstance(want, int)
            if got != want if exact else not math.isclose(got, want, rel_tol=1e-12):
                problems.append(f"row {i}: {name} differs: {got}, recorded {want}")
    if problems:
        raise GoldenError(f"{case.name}: " + "; ".join(problems) + ".")


def _differences(name: str, got: Tensor, want: Tensor) -> Sequence[str]:
    """Returns what is wrong with ``got``: integers must be equal, floats close."""
    if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
        return [
            f"{name} is {list(got.shape)} {got.dtype}, recorded {list(want.shape)} {want.dtype}"
        ]
    if not want.is_floating_point():
        wrong = got != want
    else:
        got, want = got.double(), want.double()
        largest = want.abs().max() if want.numel() else want.new_zeros(())
        wrong = ~((got - want).abs() <= RELATIVE * want.abs() + FLOOR * largest)
    if not bool(wrong.any()):
        return []
    at = tuple(wrong.nonzero()[0].tolist())
    return [
        f"{name} differs in {int(wrong.sum())} of {wrong.numel()} places, first at {at}: "
        f"{got[at].item()}, recorded {want[at].item()}"
    ]
