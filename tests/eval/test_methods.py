"""The methods table says what the code does."""

from __future__ import annotations

import pytest

from vtprune import ConfigError
from vtprune.eval import methods

SITE, SIGNALS, TOKENS, POSITIONS, PAPER, DEFAULTS = range(2, 8)


def test_what_a_row_says():
    zip_, fast, pyramid = (methods.row(name) for name in ("visionzip", "fastv", "pyramiddrop"))
    assert zip_[SITE:PAPER] == (
        "tower",
        "`ClsRow` 22, `Keys` 22; without [CLS]: `Received` 22",
        "merged",
        "renumber",
    )
    assert fast[SITE:PAPER] == ("language model 2", "`LastRow` 1", "pruned", "keep")
    assert pyramid[SITE] == "language model 8, 16, 24"
    assert fast[PAPER] == "[2403.06764](https://arxiv.org/abs/2403.06764)"
    assert methods.row("random")[PAPER] == "baseline"
    assert methods.row("vtc_cls")[SIGNALS].startswith("`ClsRow` 16, 17 ... 22;")


def test_merging_inside_the_tower_is_merging():
    assert methods.row("tome")[SITE].startswith("tower 0, 1 ...")
    assert methods.row("tome")[TOKENS] == "merged"
    assert methods.row("vispruner")[TOKENS] == "pruned"


def test_those_that_compute_less_come_after_those_that_drop_at_the_same_place():
    assert methods.row("shortv")[SITE:PAPER] == (
        "language model 0, 2 ... 31",
        "none",
        "all stay",
        "keep",
    )
    names = [line.split("|")[1].strip(" `") for line in methods.table().splitlines()[2:]]
    assert names[-3:] == ["zipvl", "lookm", "snapkv"]
    inside = [n for n in names if methods.row(n)[SITE].startswith("language model")]
    tokens = [methods.row(name)[TOKENS] for name in inside]
    turns = ["all stay" in said or 2 * ("caches" in said) for said in tokens]
    assert turns == sorted(turns)
    assert {"eemllm", "naavit", "saisa", "shortv", "yopo"} < set(inside[turns.index(1) :])


def test_what_another_model_changes():
    text = methods.row("trim")[SIGNALS]
    assert text == "`InstructionText`; with `text_encoder`: `Joint` 22"


def test_baselines_come_first():
    names = [line.split("|")[1].strip(" `") for line in methods.table().splitlines()[2:]]
    assert names[:2] == ["random", "strided"]
    assert names.index("visionzip") < names.index("divprune") < names.index("fastv")


@pytest.mark.parametrize("end", ["", " Defaults: official code. And more.", " Defaults:."])
def test_the_source_of_the_defaults_must_be_said(monkeypatch, end):
    said = "Idea: it.\n\narXiv 2403.06764 is read."
    monkeypatch.setattr(methods, "_text", lambda name: f"{said} Defaults: the\npaper.")
    assert methods.row("fastv")[DEFAULTS] == "the paper"
    monkeypatch.setattr(methods, "_text", lambda name: f"{said}{end}")
    with pytest.raises(ConfigError, match=r"docstring of fastv\.py must end with"):
        methods.row("fastv")
