"""SAISA: its projectors, those that are missing or of another model, and what tokens cost."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune
from tests import tiny
from tests.families import strangers
from tests.projectors import random_projectors
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.projectors import KIND, Projected, Projector, Projectors, load, save
from vtprune.registry import build
from vtprune.types import Patches, RowRule


def test_projectors_are_what_their_formula_says(tmp_path):
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    save(random_projectors(), tmp_path / "p")
    w = load_file(tmp_path / "p")
    assert len(w) == 16
    first, second = (
        (w[f"layers.2.linear_{i}.weight"].T, w[f"layers.2.linear_{i}.bias"]) for i in (1, 2)
    )
    units = features @ first[0] + first[1]
    units = units * 0.5 * (1 + torch.erf(units / 2**0.5))
    ours = load(str(tmp_path / "p")).make(features, 2, 32)
    torch.testing.assert_close(ours, units @ second[0] + second[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(load(str(tmp_path / "p")).make(features, 2, 32), ours)
    assert load(str(tmp_path / "p")).make(features.bfloat16(), 2, 32).dtype == torch.float32


def test_loading_draws_no_number_and_sees_a_new_file(tmp_path):
    path = tmp_path / "p"
    save(random_projectors(), path)
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    first = load(str(path))
    assert torch.equal(torch.rand(1), drawn)
    assert load(str(path)) is first
    save(random_projectors(hidden=16), path)
    assert load(str(path)).of(0).linear_1.out_features == 16
    assert load(first) is first


def test_projectors_beside_the_model_are_its_own(tmp_path):
    save(random_projectors(), tmp_path / "other")
    bare = build("saisa")
    assert bare.beside(str(tmp_path)) == bare == bare.beside("")
    save(random_projectors(), tmp_path / KIND.file)
    here = build("saisa", projectors=str(tmp_path / KIND.file))
    assert bare.beside(str(tmp_path)) == here
    given = build("saisa", projectors="other")
    assert given.beside(str(tmp_path)) == given
    model = tiny.build()
    model.save_pretrained(tmp_path)
    loaded, inputs = type(model).from_pretrained(tmp_path), tiny.one_image()
    with vtprune.wrap(loaded, "saisa") as handle:
        logits = loaded(**inputs).logits
        assert handle.steps[0].strategy == here
    with vtprune.wrap(loaded, "saisa", projectors=str(tmp_path)):
        assert torch.equal(loaded(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("projectors", "message"),
    [
        (None, "saisa has no projectors for this model. Train some with 'vtprune train saisa"),
        ("absent", "projectors='absent' is neither a file, nor a folder with a saisa_projectors"),
        ("deep", "are for 6 layers; LLaVA-1.5 (clip_vision_model) has 4. Train some"),
        ("odd", "odd holds no projectors: "),
        ("part", "part holds no projectors: "),
        ("text", "text holds no projectors: "),
    ],
)
def test_what_is_refused(projectors: Any, message, tmp_path):
    save(random_projectors(6), tmp_path / "deep")
    save_file({"w1.weight": torch.ones(2, 2)}, tmp_path / "odd")
    whole = random_projectors().state_dict()
    save_file({n: x for n, x in whole.items() if "linear_2.bias" not in n}, tmp_path / "part")
    (tmp_path / "text").write_text("no tensors")
    if projectors and (tmp_path / projectors).exists():
        projectors = str(tmp_path / projectors)
    with pytest.raises(ConfigError, match=re.escape(message)):
        vtprune.wrap(tiny.build(), "saisa", projectors=projectors)


def test_a_family_whose_tower_is_not_known():
    model, *_ = strangers.build(next(iter(strangers.BUILD)))
    depth = model.config.get_text_config().num_hidden_layers
    with pytest.raises(UnsupportedError, match=r"saisa needs Patches\(layer=\d+\); "):
        vtprune.wrap(model, "saisa", projectors=random_projectors(depth))


def test_the_published_cost_of_a_visual_token():
    """MAC of 7B: keys and values, and a projector of 1024 by 4096; 34 % of all with 64 words."""
    with torch.device("meta"):
        projectors = Projectors([Projector(1024, 4096, 4096)])
    maker = Projected(0, Patches(22), projectors)
    d, m, n, words = 4096, 11008, 576, 64
    rule = RowRule(attend="none", mlp=0.0, maker=maker)
    assert maker.macs() == pytest.approx(21.0e6, rel=2e-3)
    assert rule.macs(n, d, m) / n == pytest.approx(54.5e6, rel=2e-3)
    whole, text = (RowRule().macs(count, d, m) for count in (n + words, words))
    seen = 2 * words * n * d  # what words attend to
    assert (rule.macs(n, d, m) + text + seen) / whole == pytest.approx(0.34, abs=0.01)


def test_it_says_what_it_is():
    projectors = random_projectors()
    strategy = build("saisa", projectors=projectors)
    assert (
        repr(strategy)
        == "SAISA(layers=None, exclude_sinks=False, projectors=Projectors(4 layers, 32 - 48 - 32))"
    )
    assert strategy == build("saisa", projectors=projectors) != build("saisa")
    assert hash(strategy) == hash(build("saisa", projectors=projectors))
