"""Paired differences between strategies, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vtprune import ConfigError
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.cli import app
from vtprune.eval.compare import differences, markdown, read_answers
from vtprune.eval.results import Answer, JsonLines
from vtprune.eval.stats import paired_difference


def rows(strategy: str, budget: str, rights: list[bool], first: int = 0) -> list[Answer]:
    kinds = ("read", "count")
    return [
        Answer("t", i, kinds[i % 2], strategy, budget, "q", "a", "a", right, 8, 2.0)
        for i, right in enumerate(rights, first)
    ]


ANSWERS = [
    *rows("unpruned", "100%", [True] * 4),
    *rows("random", "50%", [True, False, False, True]),
    *rows("random", "25%", [False] * 4),
    *rows("best", "50%", [True, True, True, True]),
    *rows("best", "25%", [True, False, True, False, True]),  # the last one has no partner
]


def test_the_same_samples_at_the_same_budget():
    half, quarter = differences(ANSWERS, "random")
    assert (half.point, quarter.point) == (Point("best", "50%"), Point("best", "25%"))
    assert half.all == paired_difference([True] * 4, [True, False, False, True])
    assert (half.n, half.kinds) == (4, {"count": 0.5, "read": 0.5})
    assert (quarter.n, quarter.all.value, quarter.kinds) == (4, 0.5, {"count": 0.0, "read": 1.0})


def test_against_the_unpruned_model_at_any_budget():
    found = differences(ANSWERS, "unpruned")
    assert [(one.point, one.all.value) for one in found] == [
        (Point("random", "50%"), -0.5),
        (Point("random", "25%"), -1.0),
        (Point("best", "50%"), 0.0),
        (Point("best", "25%"), -0.5),
    ]
    assert CEILING not in [one.point for one in found]


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match="choose one of best, random, unpruned"):
        differences(ANSWERS, "randm")
    with pytest.raises(ConfigError, match=r"random has no answers at 12.5%"):
        differences([*ANSWERS, *rows("best", "12.5%", [True])], "random")
    with pytest.raises(ConfigError, match="share no sample"):
        differences([*rows("random", "5%", [True]), *rows("best", "5%", [True], 7)], "random")


def test_the_command_reads_a_sweep_and_leaves_it_as_it_was(tmp_path: Path):
    JsonLines(tmp_path / "results.jsonl", Answer).append(ANSWERS)
    before = (tmp_path / "results.jsonl").read_bytes()
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--to", "random"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results.jsonl").read_bytes() == before
    text = (tmp_path / "against-random.md").read_text()
    assert text == markdown(differences(read_answers(tmp_path), "random"), "random")
    assert "| best | 50% | 4 | +50.0 [" in text
    assert CliRunner().invoke(app, ["compare", str(tmp_path / "no"), "--to", "random"]).exit_code


def test_questions_of_some_kinds(tmp_path: Path):
    JsonLines(tmp_path / "results.jsonl", Answer).append(ANSWERS)
    half, _ = differences(read_answers(tmp_path, ["read"]), "random")
    assert (half.n, half.all.value, half.kinds) == (2, 0.5, {"read": 0.5})
    with pytest.raises(ConfigError, match="Did you mean 'read'"):
        read_answers(tmp_path, ["raed"])
