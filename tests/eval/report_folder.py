"""A folder as sweeps and benchmarks leave it, small and by hand, and what a page says."""

from __future__ import annotations

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from vtprune.eval.results import Settings
from vtprune.eval.rows import Answer, Timing

SETTINGS = Settings(
    "mini-llava", "f00d", "scenes", "", 6, 2, 0, 5, "cpu torch.float32", "vtprune 1, torch 2"
)
KINDS = ("read", "count")
# Right answers of six samples, tokens kept, share of FLOPs, milliseconds per sample.
POINTS: dict[tuple[str, str], tuple[str, float, float | None, float]] = {
    ("unpruned", "100%"): ("111110", 256, 1.0, 20),
    ("blind", "0%"): ("100000", 0, 0.02, 2),
    ("random", "50%"): ("111100", 128, 0.5, 15),
    ("random", "25%"): ("110000", 64, 0.3, 11),
    ("hiprune", "50%"): ("111111", 128, 0.5, 16),
    ("hiprune", "25%"): ("111100", 64, 0.3, 17),
}


def answers(task: str = "scenes", **changes: Any) -> list[Answer]:
    """Six answers at each of ``POINTS``, samples first."""
    return [
        Answer(
            **{
                **dict(task=task, sample=i, kind=KINDS[i % 2], strategy=strategy, budget=budget),
                **dict(question=f"q {i} ?", expected="3", answer="3" if rights[i] == "1" else "4"),
                **dict(right=rights[i] == "1", tokens=256, kept=float(kept), flops=flops),
                **changes,
            }
        )
        for i in range(6)
        for (strategy, budget), (rights, kept, flops, _) in POINTS.items()
    ]


def timings(task: str = "scenes") -> list[Timing]:
    return [
        Timing(task, strategy, budget, first, 2, float(2 * ms + first))
        for first in (0, 2, 4)
        for (strategy, budget), (_, _, _, ms) in POINTS.items()
    ]


def write(
    folder: Path,
    settings: Settings = SETTINGS,
    rows: list[Answer] | None = None,
    times: list[Timing] | None = None,
) -> Path:
    """Writes a sweep, and returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    for name, some in (
        ("results.jsonl", answers() if rows is None else rows),
        ("timings.jsonl", timings() if times is None else times),
    ):
        (folder / name).write_text("".join(json.dumps(asdict(row)) + "\n" for row in some))
    (folder / "commands.json").write_text(json.dumps(["vtprune sweep --limit 6"]))
    return folder


def bench_row(strategy: str, budget: str, batch: int = 1, scoring: float = 2.0) -> dict[str, Any]:
    medians = {"encoder": 10.0, "scoring": scoring, "compaction": 0.5, "prefill": 30.0}
    medians |= {"decode_per_token": 5.0, "end_to_end": 60.0}
    phases = {n: {"median": ms, "p20": 0.9 * ms, "p80": 1.1 * ms} for n, ms in medians.items()}
    pruned = strategy != "none"
    return {
        **dict(strategy=strategy, budget=budget, batch=batch, resolution="336x336"),
        **dict(visual_tokens=576, kept=64.0 if pruned else 576.0, phases=phases, peak_mib=None),
        **dict(over_free=1.07 if pruned else None, over_unpruned=0.7, over_random=None),
        **dict(scoring_share=0.0213 if pruned else None, break_even=48 if pruned else None),
    }


def write_bench(folder: Path, **changes: Any) -> Path:
    """Writes a benchmark, and returns the folder."""
    folder.mkdir(exist_ok=True)
    rows = [bench_row("none", "100%"), bench_row("hiprune", "64"), bench_row("random", "64", 4)]
    settings = {"model": "big", "command": "vtprune bench big", "versions": {"torch": "2"}}
    (folder / "bench.json").write_text(
        json.dumps({"settings": settings, "rows": rows} | changes, indent=1)
    )
    return folder


class Page(HTMLParser):
    """Tables by caption (header first), scripts, notes, tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.notes: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "script":
            self.scripts.append((found, ""))
        elif tag == "p" and found.get("class") == "note":
            self.notes.append("")
            self._open.append("note")
            return
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        elif tag == "caption":
            self._caption = ""
        if tag in ("script", "style", "caption", "td", "th"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and (self._open[-1] == tag or (tag == "p" and self._open[-1] == "note")):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        if inside == "style":
            return
        self.text += data
        if inside == "note":
            self.notes[-1] += data
        elif inside == "caption":
            self._caption += data
        elif inside in ("td", "th"):
            self.tables[self._caption][-1][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What charts draw, by the id of their place."""
        named = [(found["data-for"], text) for found, text in self.scripts if "data-for" in found]
        return {name: json.loads(text) for name, text in named}
