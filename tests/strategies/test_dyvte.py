"""DyVTE: gates that are missing or of another model, thresholds, and what keep makes of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune
from tests import tiny
from tests.gates import random_gates
from vtprune.errors import ConfigError, InputError
from vtprune.gates import FILE, Shared, load, make, save
from vtprune.registry import build
from vtprune.scoring.exits import exits, mean_share, threshold_for
from vtprune.strategies.dyvte import DyVTE
from vtprune.types import Budget, Signals, TextState


def test_gates_are_what_their_formula_says(tmp_path):
    state = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    path = random_gates(tmp_path)
    w = load_file(path)
    hidden = state @ w["gates.2.w1.weight"].T
    exact = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(load(str(path))(state, 3), exact @ w["gates.2.w2.weight"].T)
    path = random_gates(tmp_path, form="shared")
    w = load_file(path)
    normed = torch.cat([x / x.square().mean(1, keepdim=True).sqrt() for x in state.split(32, 1)], 1)
    hidden = normed @ w["w1.weight"].T + w["embedding.weight"][2]
    exact = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    ours = load(str(path))(state, 3)
    torch.testing.assert_close(ours, exact @ w["w2.weight"].T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, load(str(path))(state, 2))


def test_loading_draws_no_number_and_sees_a_new_file(tmp_path):
    path = random_gates(tmp_path, form="shared")
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    first = load(str(path))
    assert torch.equal(torch.rand(1), drawn)
    assert load(str(path)) is first and isinstance(first, Shared)
    random_gates(tmp_path, form="shared", samples=3)
    assert len(load(str(path)).margins) == 3


def test_the_first_margin_above_the_threshold_decides():
    margins = torch.tensor([[1.0, -1, 2], [-1, float("nan"), 3], [0, 0, 0], [-2, -1, -3]])
    assert exits(margins, 0.0).tolist() == [0, 2, 3, 3]
    assert exits(margins, -torch.inf).tolist() == [0, 0, 0, 0]
    assert mean_share(margins, (1, 2, 4), 8, 0.0) == (1 + 4 + 8 + 8) / 32


def test_gates_beside_the_model_are_its_own(tmp_path):
    path = random_gates(tmp_path)
    bare = build("dyvte")
    assert bare.beside(str(tmp_path)) == bare == bare.beside("")
    path = path.rename(tmp_path / FILE)
    assert bare.beside(str(tmp_path)) == build("dyvte", gates=str(path))
    given = build("dyvte", gates="other")
    assert given.beside(str(tmp_path)) == given
    model = tiny.build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with vtprune.wrap(loaded, "dyvte", keep=0.5) as handle:
        assert handle.steps[0].strategy == build("dyvte", gates=str(path))


@pytest.mark.parametrize("layers", [range(1, 12), (2, 3, 7), (11,)])
def test_a_threshold_hits_the_mean_that_was_asked_for(layers):
    margins = torch.randn(1000, len(layers), generator=torch.Generator().manual_seed(0))
    shares = [layers[0] / 12, 0.25, 0.5, 0.75, 0.95]
    for share in [share for share in shares if share >= layers[0] / 12]:
        threshold = threshold_for(margins, layers, 12, share)
        assert mean_share(margins, layers, 12, threshold) == pytest.approx(share, rel=0.02)
    assert threshold_for(margins, layers, 12, 1.0) == torch.inf
    assert threshold_for(margins, layers, 12, 0.0) == -torch.inf


@pytest.mark.parametrize(
    ("options", "keep", "message"),
    [
        ({}, 0.5, "dyvte has no gates for this model. Train some with 'vtprune train dyvte"),
        ({"gates": "absent"}, 0.5, "gates='absent' is neither a file, nor a folder with a"),
        ({"gates": "deep"}, 0.5, "are for 6 layers; LLaVA-1.5 (clip_vision_model) has 4. Train"),
        ({"gates": "fit"}, 0.25, "keep=0.25 is out of reach of dyvte: all tokens enter the first"),
        ({"gates": "fit", "threshold": 0.0}, 0.5, "keep=0.5 and threshold=0.0 both say when"),
        ({"gates": "new"}, 0.5, "were not calibrated, so no threshold is known for keep=0.5"),
        ({"gates": "odd"}, 0.5, "odd holds no gates that fit together"),
        ({"gates": "text"}, 0.5, "text holds no gates that fit together"),
        ({"threshold": float("nan")}, 1.0, "threshold=nan must be a number"),
        ({"gates": "fit", "layers": (0, 1)}, 0.5, "layers=(0, 1): LLaVA-1.5"),
    ],
)
def test_what_is_refused(options: dict[str, Any], keep, message, tmp_path):
    random_gates(tmp_path, 6).rename(tmp_path / "deep")
    random_gates(tmp_path).rename(tmp_path / "fit")
    save(make("per_layer", 4, 64, 8), tmp_path / "new")
    save_file({"w1.weight": torch.ones(2, 2)}, tmp_path / "odd")
    (tmp_path / "text").write_text("no tensors")
    name = options.get("gates")
    if name and (tmp_path / name).exists():
        options = {**options, "gates": str(tmp_path / name)}
    with pytest.raises(ConfigError, match=re.escape(message)):
        vtprune.wrap(tiny.build(), "dyvte", keep=keep, **options)


def test_gates_of_a_narrower_model_and_a_decision_without_a_place(tmp_path):
    path = random_gates(tmp_path, width=48)
    model = tiny.build()
    with (
        vtprune.wrap(model, "dyvte", keep=0.5, gates=str(path)),
        pytest.raises(InputError, match=r"read 48 values.*here these are 64.*of another model"),
    ):
        model(**tiny.one_image())
    signals = Signals(torch.zeros(1, 4, 2), values={TextState(1): torch.zeros(1, 64)})
    with pytest.raises(InputError, match=r"signals\.inside says where it acts"):
        DyVTE(gates=str(path)).counts(signals, Budget.of(1.0))


@pytest.mark.parametrize("form", ["per_layer", "shared"])
def test_the_report_says_what_entered(form, tmp_path):
    model, inputs = tiny.build(), tiny.ragged()
    strategy = build("dyvte", gates=str(random_gates(tmp_path, form=form)), threshold=0.0)
    with vtprune.wrap(model, strategy, keep=1.0) as handle:
        model(**inputs)
        report = handle.report()
    left = {(s.layer, s.sample) for s in report.stages if s.kept == 0}
    for row, n in enumerate((tiny.N, 2 * tiny.N)):
        (layer,) = [layer for layer, sample in left if sample == row] or [4]
        assert report.of_sample(row) == (n, n * layer / 4)
