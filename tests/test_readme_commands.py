"""The README's command lines, one after the other in one folder, each made small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vtprune.eval.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = ["--limit", "2", "--batch-size", "2"]
# What makes a command small: options that come after those of the README, and win.
LESS = {
    "sweep": SMALL,
    "tune": ["--strategy", "random", "--keep", "75%", "--max-drop", "60", "--limit", "30"]
    + ["--batch-size", "5"],
    "calibrate": SMALL,
    "analyze": ["--samples", "2", "--batch-size", "2"],
    "train dyvte": ["--samples", "8"],
    "train saisa": ["--samples", "16"],
    "train crossget": ["--samples", "56"],
    "scenes": ["--limit", "5"],
    "bench": ["--rounds", "1", "--decode-tokens", "2"],
    "bench kernels": ["--rounds", "1", "--op", "topk_sorted"],
}
KEEP = ["--keep", "50%"]  # where a command has every strategy


def section() -> str:
    return README.partition("\n## Command line\n")[2].partition("\n## ")[0]


def commands() -> list[list[str]]:
    """The words of each command in the first block of the section."""
    block = section().partition("```\n")[2].partition("```")[0]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def less(words: list[str]) -> list[str]:
    named = " ".join(words[:2])
    found = LESS.get(named, LESS.get(words[0], []))
    return [*found, *(KEEP if "all" in words else [])]


def test_every_command_of_the_cli_is_in_the_readme():
    named = {words[0] for words in commands()}
    assert named == set(_names())


def _names() -> list[str]:
    named = [*app.registered_commands, *app.registered_groups]
    return [str(one.name or getattr(one.callback, "__name__", "")) for one in named]


def test_no_two_commands_fight_over_a_folder():
    folders = [
        words[words.index("--out") + 1] if "--out" in words else "sweep"
        for words in commands()
        if words[0] == "sweep"
    ]
    assert len(set(folders)) == len(folders)


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands():
        done = CliRunner().invoke(app, [*words, *less(words)])
        assert done.exit_code == 0, f"vtprune {shlex.join(words)}\n{done.output}"
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists(), words
    written = {path.name for path in Path("runs/mine").iterdir()}
    assert {"results.jsonl", "table.md", "accuracy.png", "report.html"} <= written


def test_the_readme_names_no_other_command():
    assert set(re.findall(r"`vtprune (\w+)", README)) <= set(_names())
