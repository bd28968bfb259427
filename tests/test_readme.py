"""The tables of the README are those of the registry."""

from __future__ import annotations

import re
from pathlib import Path

from vtprune.eval.methods import table
from vtprune.registry import family_notes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_methods_table_is_that_of_the_code():
    command = "python -m vtprune.eval.methods"
    assert table() in README, f"Put what this prints into the README's methods: {command}"


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
