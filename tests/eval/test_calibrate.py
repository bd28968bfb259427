"""Which layers and heads of a model matter: measured by definition, and written for later."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from tests import tiny
from tests.engine.rules_reference import reference
from vtprune.eval.budgets import Point, points
from vtprune.eval.calibrate import head_masks, head_shares, layer_contributions
from vtprune.eval.cli import app
from vtprune.eval.results import Folder
from vtprune.eval.sweep import Sweep, settings_of
from vtprune.scoring.contribution import contribution, heads_that_look, order_of, visual_share
from vtprune.types import RowRule

FROZEN = RowRule(attend="none", mlp=0.0)


def test_a_layer_contributes_what_the_next_token_loses_without_it():
    model, batches = tiny.build(), [tiny.ragged(), tiny.one_image()]
    made = layer_contributions(model, batches)
    every = []
    for inputs in batches:
        whole = reference(model, inputs, {}, steps=1)[1][:, 0].softmax(-1)
        for layer in range(4):
            changed = reference(model, inputs, {layer: FROZEN}, steps=1)[1][:, 0].softmax(-1)
            every.append((layer, (changed * (changed / whole).log()).sum(-1)))
    for layer in range(4):
        mean = torch.cat([value for number, value in every if number == layer]).mean()
        assert made[layer] == pytest.approx(float(mean), rel=1e-3, abs=1e-6)
    assert made.min() >= 0
    assert len(set(order_of(made))) == 4


def test_contributions_of_half_precision_are_finite_and_ties_go_in_order():
    logits = torch.randn(2, 7).half()
    assert contribution(logits, logits.flip(1)).dtype == torch.float32
    assert torch.equal(contribution(logits, logits), torch.zeros(2))
    assert order_of(torch.tensor([1.0, 0.0, 1.0, 0.0])) == [1, 3, 0, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_look_at_images_as_eager_shows(attention):
    inputs = tiny.ragged()
    shown = tiny.build(attention="eager")(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == tiny.IMAGE
    shares = head_shares(tiny.build(attention=attention), [inputs, inputs])
    assert shares.shape == (4, 4, 2)
    for layer, attentions in enumerate(shown):
        rows = attentions[:, :, -1]
        seen = (rows * visual[:, None]).sum(-1)
        ratio = (seen / (rows.sum(-1) - seen)).unflatten(1, (2, 2)).mean(-1)
        torch.testing.assert_close(shares[:2, layer], ratio, rtol=1e-3, atol=1e-5)
    assert torch.equal(shares[:2], shares[2:])


def test_heads_stay_by_a_vote_and_all_in_the_first_layers():
    shares = torch.zeros(5, 4, 3)
    shares[:2, 2, 0] = shares[:3, 2, 1] = shares[:, 3, 2] = 0.5
    assert heads_that_look(shares, alpha=0.4) == ((0, 1, 2), (0, 1, 2), (1,), (2,))
    assert heads_that_look(shares, alpha=0.5)[2:] == ((), ())
    rows = torch.tensor([[[0.25, 0.75], [0.0, 1.0]]])
    assert visual_share(rows, torch.tensor([[True, False]]))[0].tolist() == pytest.approx(
        [1 / 3, 0]
    )


def test_calibrated_heads_are_taken_by_yopo():
    model, inputs = tiny.build(), tiny.ragged()
    heads = head_masks(model, [inputs], alpha=1.0)
    assert len(heads) == 4
    with vtprune.wrap(model, "yopo", heads=heads):
        assert model(**inputs).logits.isfinite().all()


def test_the_command_writes_an_order(tmp_path, model_dir):
    out = tmp_path / "order.json"
    words = ("calibrate", "shortv", "--model", model_dir, "--limit", 3, "--batch-size", 2)
    result = CliRunner().invoke(app, [*map(str, words), "--out", str(out)])
    assert result.exit_code == 0, result.output
    said = json.loads(out.read_text())
    assert sorted(said["order"]) == list(range(len(said["order"])))
    assert said["contribution"] == sorted(said["contribution"])
    assert (said["strategy"], said["task"], said["samples"]) == ("shortv", "scenes", 3)
    assert str(said["order"][0]) in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fastv",), "fastv has no layers to measure; only 'shortv' does"),
        (("short",), "Unknown strategy 'short'. Did you mean 'shortv'?"),
        (("shortv", "--out", "absent/x.json"), "there is no folder absent"),
        (("shortv", "--task", "scenery"), "Unknown task 'scenery'"),
    ],
)
def test_what_cannot_be_measured(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["calibrate", *words])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_nothing_to_show():
    result = CliRunner().invoke(app, ["show", "--strategy", "naavit"])
    assert result.exit_code == 2
    assert "naavit keeps all visual tokens" in result.stderr


def test_a_sweep_has_one_point_of_each(loaded, tmp_path):
    found = points(["random", "shortv"], ["50%", "25%"])
    assert [p for p in found if p.strategy == "shortv"] == [Point("shortv", "100%")]
    model, processor = loaded
    settings = settings_of(
        model, processor, "untrained", task="scenes", limit=2, batch_size=2, seed=0
    )
    folder = Folder(tmp_path, settings)
    Sweep(model, processor, points(["shortv"], ["50%"]), settings).run(folder)
    rows = [row for row in folder.answers.rows if row.strategy == "shortv"]
    assert len(rows) == 2
    assert all(row.kept == row.tokens for row in rows)
    assert all(row.flops is not None and 0 < row.flops < 1 for row in rows)
