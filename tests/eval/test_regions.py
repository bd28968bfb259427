"""Which patches are drawn as one, and pictures of what merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune import ConfigError
from vtprune.eval import scenes, shipped
from vtprune.eval.cli import app
from vtprune.eval.regions import enlarged, in_mean_color, regions_of
from vtprune.eval.samples import Asker
from vtprune.eval.scene_objects import make_picture
from vtprune.eval.show import kept_mask, what_to_show
from vtprune.types import Mix, Selection


def selection(rows, n, edges=()):
    mix = None
    if edges:
        source, target, weight = (torch.tensor([part]) for part in zip(*edges, strict=True))
        mix = Mix(source, target, weight.float())
    return Selection(torch.tensor([rows]), n, mix)


def test_what_only_leaves_is_one_region():
    lit = np.array([[True, False], [False, True]])
    assert regions_of(selection([0, 3], 4), lit).tolist() == [[0, -1], [-1, 0]]


def test_a_patch_is_with_the_token_that_has_most_of_it():
    edges = [(0, 0, 0.9), (1, 0, 0.2), (1, 1, 0.8), (3, 1, 0.2), (4, 0, 0.5)]  # 4 is a [CLS]
    lit = np.array([[True, False], [False, True]])
    assert regions_of(selection([0, 3], 4, edges), lit).tolist() == [[0, 1], [-1, 1]]
    lit[1, 1] = False  # its token has left inside the language model
    assert regions_of(selection([0, 3], 4, edges), lit).tolist() == [[0, 0], [-1, -1]]


def test_regions_of_several_patches_have_their_mean_color():
    seen = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    regions = np.array([[0, 1], [0, -1]])
    painted = in_mean_color(seen, regions)
    assert np.allclose(painted[:, :4], seen[:, :4].mean((0, 1)))
    assert np.array_equal(painted[:, 4:], seen[:, 4:])
    assert enlarged(regions, (6, 5)).shape == (6, 5)


def test_regions_of_a_merging_strategy_in_a_language_model(loaded):
    model, processor = loaded
    inputs = Asker(processor)(["how many digits ?"], [scenes.make_scene(7).image])
    with vtprune.wrap(model, "visionzip", keep=20) as handle:
        model(**inputs)
        regions = regions_of(handle.selections[0], kept_mask(handle, inputs["input_ids"]))
    assert regions.shape == (16, 16)
    assert regions.min() >= 0 and len(np.unique(regions)) >= 19  # one may be of [CLS] alone


@pytest.mark.parametrize(("strategy", "left"), [("tome", 39), ("strided", 39)])
def test_show_draws_the_classifier(tmp_path, monkeypatch, strategy, left):
    monkeypatch.chdir(tmp_path)
    args = ["show", "--model", "mini-vit", "--scene", "3", "--strategy", strategy, "--keep", "20%"]
    result = CliRunner().invoke(app, [*args, "--out", "x.png"])
    assert result.exit_code == 0, result.output
    label = shipped.load("mini-vit")[1].config["pretrained_cfg"]["label_names"]
    assert f"unpruned: {label[make_picture(3).label]})" in result.output
    assert f"{left} of 196 visual tokens" in result.output
    with Image.open(tmp_path / "x.png") as picture:
        left_half, right = np.array_split(np.asarray(picture.convert("RGB"))[80:-20], 2, axis=1)
    assert (right.mean() < 0.7 * left_half.mean()) == (strategy == "strided")


def test_what_is_shown_to_a_vit(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (40, 30), "red").save(path)
    picture, caption = what_to_show(None, 4, None, "mini-clip")
    assert isinstance(picture, Image.Image)
    assert picture.size == (112, 112) and caption.startswith("a ")
    given, _ = what_to_show(path, 4, None, "mini-vit")
    assert isinstance(given, Image.Image) and given.size == (40, 30)
    with pytest.raises(ConfigError, match="mini-vit is asked nothing"):
        what_to_show(None, 0, "what ?", "mini-vit")
    with pytest.raises(ConfigError, match="Give one as --question"):
        what_to_show(path, 0, None, "mini-clip")
