"""The shipped models do what their cards say, on the first 200 held-out scenes or clips."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from vtprune.eval import load, shipped
from vtprune.eval.budgets import CEILING, FLOOR, points
from vtprune.eval.results import Folder
from vtprune.eval.samples import CLIPS, DEFAULT
from vtprune.eval.stats import summarize
from vtprune.eval.sweep import Sweep, settings_of

N = 200


# Clips repeat themselves, so that many tokens may go before anything is lost.
CASES = {"mini-llava": (DEFAULT, "25%", 0.9), "mini-qwen": (DEFAULT, "25%", 0.9)}
CASES |= {"mini-video": (CLIPS, "6.25%", 0.8)}


def summaries(name):
    """What is measured by point: unpruned, blind, random at the card's budget."""
    model, processor = load(name)
    task, keep, _ = CASES[name]
    settings = settings_of(model, processor, name, task=task, limit=N, batch_size=20, seed=0)
    chosen = points(["random"], [keep])
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(Path(path), settings)
        Sweep(model, processor, chosen, settings).run(folder)
        found = summarize(chosen, folder.answers.rows, folder.timings.rows)
    return dict(zip(chosen, found, strict=True))


def on_card(name, column):
    """The share of right answers over all tasks that the card's table gives."""
    card = (shipped.MODELS / name / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| all \| 1000 \|(.*)\|$", card, re.MULTILINE)
    assert row is not None
    return float(row[1].split("|")[column].split()[0]) / 100


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped.vlm_names())
def test_a_model_is_an_instrument_and_does_what_its_card_says(name):
    measured = summaries(name)
    for column, found in zip((0, 1, -1), measured.values(), strict=True):
        assert found.n == N
        assert found.accuracy.low <= on_card(name, column) <= found.accuracy.high
    seen, blind, pruned = measured.values()
    assert list(measured)[:2] == [CEILING, FLOOR]
    assert seen.accuracy.value >= CASES[name][2]
    assert blind.accuracy.value <= 0.4
    assert pruned.accuracy.value <= seen.accuracy.value - 0.15
