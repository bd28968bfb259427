"""The shipped ViTs: found by name or folder, whole, and with inputs made as they were trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune import ConfigError, UnsupportedError
from vtprune.eval import mini_vit, shipped
from vtprune.eval.scene_objects import make_picture
from vtprune.eval.stats import accuracy

pytest.importorskip("timm")
NAME = "mini-vit"


def test_it_names_what_is_there():
    model, inputs = shipped.load(NAME)
    assert not model.training and shipped.vit(NAME) == NAME == inputs.name
    found = accuracy(sum(mini_vit.right(model, 224)), 224)
    assert found.low >= 0.95


def test_inputs_are_those_of_training():
    _, inputs = shipped.load(NAME)
    pictures = [make_picture(i) for i in range(3)]
    found = inputs.images([picture.image for picture in pictures])
    assert torch.equal(found, mini_vit.preprocess(pictures))
    wide = Image.fromarray(np.full((50, 70), 255, dtype=np.uint8))
    assert inputs.images([wide]).shape == (1, 3, 112, 112)
    assert inputs.images([wide]).min() == 1
    with pytest.raises(UnsupportedError, match="mini-vit reads no text"):
        inputs.captions(["a red 7"])


def test_fingerprints_tell_models_apart():
    model, inputs = shipped.load(NAME)
    whole = shipped.fingerprint(model, inputs)
    assert shipped.fingerprint(*shipped.load(str(shipped.MODELS / NAME))) == whole
    with torch.no_grad():
        model.head.bias[0] += 1
    assert shipped.fingerprint(model, inputs) != whole


def test_damage_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    path = shutil.copytree(Path(mini_vit.__file__).parent / "models" / NAME, tmp_path / NAME)
    shipped.verify(NAME)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-20] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not the file that was shipped"):
        shipped.load(NAME)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"):
        shipped.load(NAME)


def test_other_classifiers_are_not_asked(tmp_path):
    path = shutil.copytree(shipped.MODELS / NAME, tmp_path / "mine")
    assert shipped.vit(str(path)) == NAME
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = ["cat", "dog"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="was not trained on the pictures of vtprune"):
        shipped.load(str(path))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'vtprune\[vit\]'"):
        shipped.load(NAME)


def test_all_weights_together():
    sizes = [file.stat().st_size for file in shipped.MODELS.rglob("*.safetensors")]
    assert sum(sizes) < 45e6
