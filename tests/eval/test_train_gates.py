"""Training the gates of DyVTE: what is a label, going on after an interruption, what is learnt."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import vtprune
from tests import tiny
from tests.probes import generate
from vtprune.errors import ConfigError
from vtprune.eval import train_gates
from vtprune.eval.cli import app
from vtprune.eval.train_gates import Labelled, Leaving, collect, fit, held_out, label
from vtprune.gates import load, threshold
from vtprune.registry import build
from vtprune.scoring.exits import mean_share


@torch.no_grad()
def test_states_are_what_enters_a_layer_and_labels_what_stays_the_same():
    model, inputs = tiny.build(), tiny.one_image()
    labelled = label(model, inputs, max_new_tokens=3)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    last = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
    for layer in range(1, 4):
        words = hidden[layer][0, last + 1 :]
        wanted = torch.cat([words[:-1].mean(0), words[-1]])
        torch.testing.assert_close(labelled.states[0, layer], wanted, rtol=1e-4, atol=1e-4)
    ids, _ = generate(model, inputs, n=3)
    told = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}
    told["attention_mask"] = torch.ones_like(told["input_ids"])
    whole = model(**told).logits[0, -4:-1]
    limit = 1.03 * cross_entropy(whole, ids[0]) + 0.01
    wanted = [0]
    for layer in range(1, 4):
        with vtprune.wrap(model, Leaving(at=layer), keep=1.0):
            without = model(**told).logits[0, -4:-1]
        same = torch.equal(without.argmax(-1), whole.argmax(-1))
        wanted.append(int(same and cross_entropy(without, ids[0]) < limit))
    assert labelled.labels.tolist() == [wanted]


def test_all_may_leave_where_nothing_changes(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    same = (torch.tensor([1, 2]), 0.5)
    monkeypatch.setattr(train_gates, "_read", lambda *args: same)
    assert label(model, inputs).labels.tolist() == [[0, 1, 1, 1]]
    answers = iter([same, (torch.tensor([1, 2]), 0.6), (torch.tensor([1, 3]), 0.5), same])
    monkeypatch.setattr(train_gates, "_read", lambda *args: next(answers))
    assert label(model, inputs).labels.tolist() == [[0, 0, 0, 1]]


def test_an_interrupted_collection_goes_on(tmp_path, monkeypatch):
    model, path, asked = tiny.build(), tmp_path / "samples", []
    monkeypatch.setattr(train_gates, "EVERY", 2)

    def sample(number: int):
        if number == 3 and 3 not in asked:
            asked.append(3)
            raise KeyboardInterrupt
        asked.append(number)
        return tiny.batch(tiny.prompt(2, 3, 1, seed=number), seed=number)

    with pytest.raises(KeyboardInterrupt):
        collect(model, sample, 5, path, "this")
    found = collect(model, sample, 5, path, "this")
    assert asked == [0, 1, 2, 3, 2, 3, 4]
    whole = collect(model, sample, 5, tmp_path / "others", "this")
    assert torch.equal(found.states, whole.states) and torch.equal(found.labels, whole.labels)
    assert len(collect(model, sample, 2, path, "this").labels) == 2
    with pytest.raises(ConfigError, match="samples of another model"):
        collect(model, sample, 5, path, "that")


def drawn(n: int = 400, depth: int = 4, width: int = 16) -> Labelled:
    """The deeper, the more often; a sample's first value says when."""
    states = torch.randn(n, depth, width, generator=torch.Generator().manual_seed(0))
    labels = (states[:, :, 0] + torch.arange(depth) - 2 > 0).long()
    labels[:, 0] = 0
    return Labelled(states, labels)


@pytest.mark.parametrize("form", ["shared", "per_layer"])
def test_gates_learn_what_can_be_learnt(form):
    labelled = drawn()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    gates = fit(labelled, form, hidden=32, lr=1e-2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(fit(labelled, form, hidden=32, lr=1e-2).margins, gates.margins)
    labels = held_out(labelled).labels[:, 1:] == 1
    right = ((gates.margins[:, 1:] > 0) == labels).float().mean()
    assert len(gates.margins) == 100
    often = labels.float().mean(0)
    assert right > 0.85 > torch.maximum(often, 1 - often).mean() + 0.05  # the better constants
    for share in (0.3, 0.5, 0.8):
        at = threshold(gates, (1, 2, 3), share)
        assert mean_share(gates.margins[:, 1:], (1, 2, 3), 4, at) == pytest.approx(share, abs=0.01)


def test_the_command_writes_gates_and_uses_its_samples_again(tmp_path, model_dir, loaded):
    out = tmp_path / "gates.safetensors"
    words = ("train", "dyvte", "--model", str(model_dir), "--samples", "8", "--out", str(out))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "gate is right" in result.output
    first = load(str(out))
    result = CliRunner().invoke(app, (*words, "--form", "per_layer"))
    assert result.exit_code == 0, result.output
    second = load(str(out))
    assert (first.depth, first.width) == (second.depth, second.width) == (12, first.width)
    assert type(first) is not type(second)
    assert len(second.margins) == 2
    vtprune.wrap(loaded[0], build("dyvte", gates=str(out)), keep=0.5).remove()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fastv",), "fastv has nothing to train; only dyvte, saisa, "),
        (("dyvtes",), "Unknown strategy 'dyvtes'. Did you mean 'dyvte'?"),
        (("dyvte", "--out", "absent/x"), "there is no folder absent"),
        (("dyvte", "--form", "deep"), "form='deep' is unknown; choose shared or per_layer"),
        (("saisa", "--form", "shared"), "--form shared is of the gates of dyvte; leave it out"),
    ],
)
def test_what_cannot_be_trained(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
