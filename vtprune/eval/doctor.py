"""The report of ``vtprune doctor``: what is installed, what works here, what brings the rest."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from textwrap import indent

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import vtprune
from vtprune.eval.doctor_dependencies import (
    CORE,
    MISSING,
    OK,
    REQUIRED,
    WRONG,
    Dependency,
    dependencies,
)
from vtprune.eval.doctor_probes import Finding, backends, devices, models

BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")  # how torch was built
STYLES = {OK: "green", "works": "green", MISSING: "yellow", WRONG: "red"}


@dataclass(frozen=True)
class Problem:
    """What is wrong or missing, the commands that repair it, and whether vtprune needs it."""

    what: str
    command: str
    required: bool


@dataclass(frozen=True)
class Report:
    """Everything ``vtprune doctor`` says. ``versions`` are pairs of name and version."""

    versions: tuple[tuple[str, str], ...]
    dependencies: tuple[Dependency, ...]
    devices: tuple[Finding, ...]
    backends: tuple[Finding, ...]
    models: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        """Whether something required is wrong; a missing optional extra is not."""
        return any(problem.required for problem in self.problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong or missing, required things first."""
        found = [*self._unmet(), *self._failing()]
        return tuple(sorted(found, key=lambda problem: not problem.required))

    def _unmet(self) -> Iterator[Problem]:
        unmet = [d for d in self.dependencies if d.status in (MISSING, WRONG)]
        for group in dict.fromkeys(d.group for d in unmet):
            listed = ", ".join(
                f"{d.wanted} ({f'{d.installed} is installed' if d.installed else MISSING})"
                for d in unmet
                if d.group == group
            )
            target = "vtprune" if group == CORE else f"'vtprune[{group}]'"
            yield Problem(f"{group}: {listed}", f"pip install {target}", group in REQUIRED)

    def _failing(self) -> Iterator[Problem]:
        """Yields what is required but does not work; of several with the same cause, the first."""
        needed = {d.name for d in self.dependencies if d.group in REQUIRED and d.status == OK}
        packages = [(finding, finding.name) for finding in self.backends if finding.name in needed]
        packages += [(finding, "vtprune") for finding in self.models]
        causes = set()
        for finding, package in packages:
            if not finding.works and finding.note not in causes:
                causes.add(finding.note)
                yield Problem(f"{finding.name}: {finding.note}", self._reinstall(package), True)

    def _reinstall(self, package: str) -> str:
        torch = next((f.note for f in self.backends if f.name == "torch" and f.works), "")
        if package == "torchvision" and torch:
            return _fit_torchvision(torch)
        return f"pip install --force-reinstall --no-deps {package}"


def run() -> bool:
    """Prints the report; returns whether something required is wrong."""
    report = examine()
    Console().print(render(report))
    return report.broken


def examine() -> Report:
    """Looks at this installation and this machine; raises nothing and needs no network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is in the report
        return Report(_versions(), dependencies(), devices(), backends(), models())


def render(report: Report) -> Group:
    """Returns the report for a console of 80 columns or more; it needs no colors to be read."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions)
    needs = [(d.group, d.wanted, d.installed or "-", d.status) for d in report.dependencies]
    parts: list[RenderableType] = [
        Text(versions),
        _table(("extra", "requirement", "installed", "status"), needs),
    ]
    sections = {"devices": report.devices, "backends": report.backends, "models": report.models}
    for title, findings in sections.items():
        rows = [(f.name, "works" if f.works else "-", f.note) for f in findings]
        parts.append(_table((title, "", ""), rows))
    for problem in report.problems:
        kind, style = ("Error", "bold red") if problem.required else ("Optional", "yellow")
        command = indent(problem.command, "    ")
        parts.append(Text.assemble((kind, style), f": {problem.what}\n{command}"))
    verdict = "Something required is wrong." if report.broken else "All that is required is here."
    return Group(*parts, Text(f"\n{verdict}"))


def _versions() -> tuple[tuple[str, str], ...]:
    python, system = platform.python_version(), platform.platform()
    return ("vtprune", vtprune.__version__), ("Python", python), ("on", system)


def _fit_torchvision(torch: str) -> str:
    """Returns what brings the torchvision of the same version and build as ``torch``."""
    build = BUILD.search(torch)
    index = f" \\\n  -i https://download.pytorch.org/whl/{build[1]}" if build else ""
    wanted = f"torchvision torch=={torch.partition('+')[0]}"
    return f"pip uninstall -y torchvision\npip install {wanted}{index}"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """Cells are Text, in which brackets are no markup."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    return table
