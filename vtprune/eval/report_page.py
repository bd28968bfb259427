"""The page of a report, from its parts and ``templates``."""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vtprune
from vtprune.eval._extras import need
from vtprune.eval.bench_model_output import legend
from vtprune.eval.lmms_metrics import CAPTION as COUNTED
from vtprune.eval.report_analysis_charts import Picture
from vtprune.eval.report_bench import COLUMNS as PHASE_COLUMNS
from vtprune.eval.report_charts import Chart
from vtprune.eval.report_data import Run
from vtprune.eval.report_overlays import Gallery
from vtprune.eval.report_tables import COLUMNS, EXPLAINED, Task

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """One folder: its tables, charts by task and axis, bars by batch and resolution, pictures.

    Of an analysis charts of the ``layers`` by name, and the ``places`` that survive.
    """

    run: Run
    tasks: list[Task]
    curves: dict[str, dict[str, Chart]]
    bars: dict[str, Chart]
    gallery: Gallery
    layers: dict[str, Chart] = field(default_factory=dict)
    places: Sequence[Picture] = ()

    @property
    def title(self) -> str:
        """What was measured."""
        if self.run.swept:
            return self.run.swept.settings.model
        named = self.run.bench or self.run.analysis
        return named.model if named else str(self.run.path)

    @property
    def notes(self) -> list[str]:
        """What is damaged or missing in the folder."""
        return self.run.swept.notes if self.run.swept else []

    @property
    def commands(self) -> list[str]:
        """The command lines that measure this."""
        swept = self.run.swept.commands if self.run.swept else []
        return [*swept, *(one.command for one in (self.run.bench, self.run.analysis) if one)]

    @property
    def parts(self) -> dict[str, str]:
        """The headings by their anchors."""
        found = {str(i): task.name for i, task in enumerate(self.tasks, 1)}
        found |= {"pictures": "what was kept"} if self.run.swept else {}
        found |= {"phases": "where the time goes"} if self.run.bench else {}
        found |= {"analysis": "what is looked at"} if self.run.analysis else {}
        return found | {"how": "how it was measured"}


def render(sections: Sequence[Section], library: str) -> str:
    """Returns the page; ``library`` is the script that draws charts.

    All that is printed is escaped, and but for that script and ours none runs in the page.
    """
    jinja = need("jinja2", extra="eval")
    trusted = need("markupsafe", extra="eval").Markup
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [library, (TEMPLATES / "report.js").read_text(encoding="utf-8")]
    known: dict[str, Any] = {
        "sections": sections,
        "titles": ", ".join(dict.fromkeys(section.title for section in sections)),
        "columns": COLUMNS,
        "explained": EXPLAINED,
        "phase_columns": PHASE_COLUMNS,
        "legend": legend(),
        "counted": COUNTED,
        "scripts": [trusted(script) for script in scripts],
        "hashes": [script_hash(script) for script in scripts],
        "style": trusted((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "maker": f"vtprune {vtprune.__version__}, Python {platform.python_version()}",
    }
    return environment.get_template("report.html").render(known)


def script_hash(script: str) -> str:
    """Returns what a content security policy calls a script that may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
