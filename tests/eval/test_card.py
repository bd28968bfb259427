from __future__ import annotations

import pytest

from vtprune import ConfigError
from vtprune.eval.card import card
from vtprune.eval.results import Answer


def row(sample, kind, expected, answer, strategy="unpruned", budget="100%"):
    return Answer(
        "scenes",
        sample,
        kind,
        strategy,
        budget,
        "?",
        expected,
        answer,
        expected == answer,
        256,
        64.0,
    )


SEEN = [
    row(0, "read", "3", "3"),
    row(1, "color", "red", "blue"),
    row(2, "read", "5", "3"),
    row(3, "color", "blue", "blue"),
]
PRUNED = [row(r.sample, r.kind, r.expected, "red", "random", "25%") for r in SEEN]


def test_figures_by_hand():
    text = card(SEEN + PRUNED)
    assert "| question | n | unpruned 100% | random 25% |" in text
    assert "| read | 2 | 50.0 | 0.0 |" in text
    assert "| color | 2 | 50.0 | 50.0 |" in text
    assert "| all | 4 | 50.0 [15.0, 85.0] | 25.0 [4.6, 69.9], -25.0 [" in text
    assert "| `color` | blue | red |\n|---|---:|---:|\n| blue | 1 |  |\n| red | 1 |  |" in text
    assert "| `read` | 3 | 5 |\n|---|---:|---:|\n| 3 | 1 |  |\n| 5 | 1 |  |" in text


def test_many_answers_become_a_list():
    rows = [row(i, "number", str(10 + i), str(10 + i)) for i in range(20)]
    assert "`number`, wrong answers: none." in card(rows)
    rows[4] = row(4, "number", "14", "1")
    assert "`number`, wrong answers: 14 as 1." in card(rows)


def test_without_unpruned_answers():
    with pytest.raises(ConfigError, match="lacks answers"):
        card(PRUNED)
