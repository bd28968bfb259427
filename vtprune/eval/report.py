"""One HTML file about sweeps, benchmarks and analyses, which needs nothing else, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval import report_analysis_charts as layers
from vtprune.eval import report_charts as charts
from vtprune.eval._extras import need
from vtprune.eval.report_data import Run, Swept, read_run
from vtprune.eval.report_overlays import Gallery, gallery
from vtprune.eval.report_page import Section, render
from vtprune.eval.report_tables import tasks_of
from vtprune.eval.results import write_whole


@dataclass(frozen=True)
class Pictures:
    """Which pictures are drawn: the ``samples`` of these numbers, or, of none, some that tell most.

    ``model`` says where the model is, if not where the sweep had it.
    """

    wanted: bool = True
    samples: tuple[int, ...] = ()
    model: str = ""

    @property
    def asked_for(self) -> bool:
        """Whether it was said which, so that none is no answer."""
        return bool(self.samples or self.model)


def write_report(
    folders: Sequence[Path],
    out: Path,
    pictures: Pictures,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """Writes the report of ``folders`` to ``out``; returns what is to be known about it.

    Args:
        tell: is told how many samples of a folder are drawn, of how many.

    Raises:
        ConfigError: a folder holds nothing to report, or the file cannot be written.
        ImportError: plotly or jinja2 is not installed.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    check_out(out)
    if pictures.asked_for and not any(run.swept for run in runs):
        raise ConfigError(
            f"{runs[0].path} holds no sweep, so there are no samples to draw. Leave --samples and "
            "--model out, or give the folder of a sweep too."
        )
    need("jinja2", extra="eval")  # before the model runs
    library = charts.library()
    sections = [_section(run, pictures, tell) for run in runs]
    try:
        write_whole(out, render(sections, library))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}.") from error
    return [
        f"{section.run.path}: {note}"
        for section in sections
        for note in (*section.notes, section.gallery.note)
        if note
    ]


def check_out(out: Path) -> None:
    """Raises ConfigError when no report can be written to ``out``."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: give a file name that ends in .html.")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: give a file in a folder that exists.")


def _section(run: Run, pictures: Pictures, tell: Callable[[int, int], None]) -> Section:
    tasks = tasks_of(run.swept) if run.swept else []
    curves = {t.name: {axis.name: charts.accuracy(t, axis) for axis in t.axes} for t in tasks}
    groups = run.bench.groups() if run.bench else {}
    bars = {name: charts.phases(rows) for name, rows in groups.items()}
    drawn = _gallery(run.swept, pictures, tell) if run.swept else Gallery()
    points = run.analysis.points if run.analysis else []
    seen = (layers.charts(points), layers.pictures(points)) if points else ({}, ())
    return Section(run, tasks, curves, bars, drawn, *seen)


def _gallery(swept: Swept, pictures: Pictures, tell: Callable[[int, int], None]) -> Gallery:
    """Returns the pictures, or why there are none; raises where they were asked for by name."""
    if not pictures.wanted:
        return Gallery(note="Pictures were not asked for.")
    try:
        return gallery(swept, pictures.samples, pictures.model, tell)
    except (VTPruneError, ImportError) as error:
        if pictures.asked_for:
            raise
        return Gallery(note=f"There are no pictures. {error}")
