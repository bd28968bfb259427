"""The tables of the README are those of the registry."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from vtprune.registry import family_notes, strategy_class, strategy_names

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def row_of(name: str) -> str:
    """The table row of a strategy, from the first line of its docstring and its paper."""
    text = inspect.getdoc(sys.modules[strategy_class(name).__module__]) or ""
    paper = re.search(r"arXiv (\d{4}\.\d{5})", text)
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "baseline"
    return f"| `{name}` | {text.partition(chr(10))[0]} | {link} |"


def test_every_strategy_is_listed():
    missing = [row_of(name) for name in strategy_names() if row_of(name) not in README]
    assert not missing, "Put into the README's methods table:\n" + "\n".join(missing)


def model_rows() -> list[str]:
    """The rows of the models table, from the adapters."""
    rows: dict[type, list[str]] = {}
    for name, (adapter, _) in family_notes().items():
        rows.setdefault(adapter, []).append(f"`{name}`")
    notes = {adapter: note for adapter, note in family_notes().values()}
    return [
        f"| {adapter.title} | {', '.join(names)} | {adapter.towers} | {adapter.takes} "
        f"| {notes[adapter]} |"
        for adapter, names in rows.items()
    ]


def test_every_family_is_listed():
    missing = [row for row in model_rows() if row not in README]
    assert model_rows()
    assert not missing, "Put into the README's models table:\n" + "\n".join(missing)


def test_the_commands_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.MULTILINE))
