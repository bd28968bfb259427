"""What lmms-eval makes of the answers: metrics per task, scores per sample, and their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.eval.budgets import Point
from vtprune.eval.rows import Answer, JsonLines, Key, write_whole

FILE = "metrics.jsonl"
KINDS = ("kind", "category", "question_type")  # what tasks call the kind of a question
CAPTION = (
    "As lmms-eval names and counts them, with its standard error, where it gives one. Kept: visual "
    "tokens that enter a layer of the language model."
)


@dataclass(frozen=True)
class Metrics:
    """The metrics of a task of lmms-eval at one point, over ``n`` samples.

    ``values`` has by task, of which a group has several, and by metric and filter a ``value`` and
    its ``stderr``, None where there is none. ``kept`` is the mean number of visual tokens that
    enter a layer.
    """

    task: str
    strategy: str
    budget: str
    n: int
    kept: float
    values: dict

    @property
    def point(self) -> Point:
        return Point(self.strategy, self.budget)

    @property
    def key(self) -> Key:
        return self.task, self.point, 0


def metrics_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``values`` of a row from what lmms-eval returns."""
    found = {}
    for task, named in results["results"].items():
        found[task] = {
            name: {"value": _plain(value), "stderr": _error(named, name)}
            for name, value in named.items()
            if "," in name and not _is_error(name) and value not in (None, "", [])
        }
    return {task: values for task, values in found.items() if values}


def _is_error(name: str) -> bool:
    return name.partition(",")[0].endswith(("_stderr", "_stderr_clt", "_stderr_clustered"))


def _error(named: Mapping[str, Any], name: str) -> float | None:
    metric, _, chosen = name.partition(",")
    for kind in ("stderr", "stderr_clt"):
        value = named.get(f"{metric}_{kind},{chosen}")
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    return None


def _plain(value: Any) -> float | str:
    return float(value) if isinstance(value, Real) else str(value)


def score_of(sample: Mapping[str, Any], metrics: Sequence[str], key: str) -> float | None:
    """Returns the score of a sample, 0 to 1, by the first metric that gives it one.

    Args:
        metrics: their names, in the order of the task.
        key: where a metric hands on more than a number, the score's name there.
    """
    for name in metrics:
        value = sample.get(name)
        value = value.get(key) if isinstance(value, Mapping) else value
        if isinstance(value, Real) and 0 <= float(value) <= 1:
            return float(value)
    return None


def answers_of(
    results: Mapping[str, Any], task: str, point: Point, counts: Mapping[tuple[str, Any], Any]
) -> list[Answer]:
    """Returns a row per sample that has a score; samples are numbered through a group's tasks.

    Args:
        results: what lmms-eval returns.
        task: name of the rows' task.
        counts: by task of lmms-eval and document what became of the request, a ``Reply``.
    """
    rows, before = [], 0
    for name in sorted(results["samples"]):
        metrics = list(results["higher_is_better"].get(name, {}))
        key = results["configs"][name].get("score_key") or "score"
        documents: dict[Any, Mapping[str, Any]] = {}
        for sample in results["samples"][name]:  # once per filter, of which the first counts
            documents.setdefault(sample["doc_id"], sample)
        for place, (doc_id, sample) in enumerate(sorted(documents.items()), before):
            score = score_of(sample, metrics, key)
            if score is not None:
                count = counts[name, doc_id]
                rows.append(_row(sample, task, place, name, point, score, count))
        before += len(documents)
    return rows


def _row(
    sample: Mapping[str, Any],
    task: str,
    place: int,
    name: str,
    point: Point,
    score: float,
    count: Any,
) -> Answer:
    doc = sample["doc"]
    kinds = (doc[kind] for kind in KINDS if isinstance(doc.get(kind), str))
    return Answer(
        task,
        place,
        next(kinds, name),
        point.strategy,
        point.budget,
        str(next(iter(sample["arguments"]), "")),
        str(sample["target"]),
        str(sample["filtered_resps"][0]),
        bool(score) if score in (0, 1) else score,
        count.tokens,
        round(count.kept, 2),
        count.flops,
        count.cache,
    )


def write_metrics(folder: Path, points: Sequence[Point], console: Console) -> None:
    """Writes ``metrics.md`` and prints the tables of the metrics that ``folder`` holds, if any.

    Args:
        points: those that come first, in this order.
    """
    if not (folder / FILE).exists():
        return
    rows = JsonLines(folder / FILE, Metrics).rows
    order = list(dict.fromkeys([*points, *(row.point for row in rows)]))
    rows.sort(key=lambda row: order.index(row.point))
    texts = []
    for task in dict.fromkeys(row.task for row in rows):
        for name in dict.fromkeys(name for row in rows if row.task == task for name in row.values):
            title = task if task.endswith(f":{name}") else f"{task}, {name}"
            ours = [row for row in rows if row.task == task and name in row.values]
            lines = table_of(ours, name)
            console.print(_rich(lines, title))
            texts.append(_markdown(lines, title))
    console.print(CAPTION)
    write_whole(folder / "metrics.md", "\n".join([*texts, f"{CAPTION}\n"]))


def table_of(rows: Sequence[Metrics], name: str) -> list[tuple[str, ...]]:
    """Returns header and lines of the table of one task of lmms-eval."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.values[name]))
    header = ("strategy", "budget", *(m.removesuffix(",none") for m in metrics), "kept", "n")
    lines = []
    for row in rows:
        cells = (_cell(row.values[name].get(metric, {})) for metric in metrics)
        lines.append((row.strategy, row.budget, *cells, f"{row.kept:.4g}", str(row.n)))
    return [header, *lines]


def _cell(found: Mapping[str, Any]) -> str:
    value, error = found.get("value"), found.get("stderr")
    if not isinstance(value, float):
        return str(value or "")
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _rich(lines: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=Text(title), box=box.SIMPLE, padding=(0, 1))
    for i, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="left" if i == 0 else "right")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def _markdown(lines: Sequence[Sequence[str]], title: str) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    body = "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
    return f"{title}\n\n{body}"
