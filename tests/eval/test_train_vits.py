"""Training what strategies add to ViTs: resumed, written where a strategy finds it, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval import mini_vit, shipped, train_vits
from vtprune.eval.cli import app
from vtprune.eval.train_loop import Stage
from vtprune.eval.train_sparsifiner import SparsifinerTrainer
from vtprune.eval.train_vit import shown
from vtprune.strategies.dependencyvit import MESSENGERS

pytest.importorskip("timm")
OPTIONS = {"sparsifiner": "predictors", "dynamicvit": "keepers"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an untrained classifier."""
    monkeypatch.setattr(train_vits, "BATCH", 2)
    mini_vit.save(mini_vit.build_model(), tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize("strategy", OPTIONS)
def test_what_is_trained_is_what_a_strategy_takes(strategy: str, folder: Path) -> None:
    out = folder / "made.safetensors"
    options: dict[str, Any] = {OPTIONS[strategy]: str(out)}
    if strategy == "dynamicvit":
        options["keep"] = 0.5
    train_vits.train_vit(strategy, str(folder), out, samples=4)
    model: Any = mini_vit.load(folder)
    pixels = shown(0, 2).pixels
    with torch.no_grad():
        plain = model(pixels)
        with vtprune.wrap(model, strategy, **options):
            assert not torch.equal(model(pixels), plain)
    again = out.read_bytes()
    train_vits.train_vit(strategy, str(folder), out, samples=4)  # it is done already
    assert out.read_bytes() == again


def test_a_dependencyvit_is_a_folder_of_its_own(folder: Path) -> None:
    timm = pytest.importorskip("timm")
    out = folder.parent / "dependency"
    train_vits.train_vit("dependencyvit", str(folder), out, samples=4)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pixels = shown(0, 2).pixels
    with torch.no_grad():
        plain = model(pixels)
        with vtprune.wrap(model, "dependencyvit", keep=0.5) as handle:
            assert not torch.allclose(model(pixels), plain, atol=1e-4)
            assert handle.report().images[0].kept == 98
    assert (out / MESSENGERS.file).is_file()
    assert json.loads((out / "config.json").read_text())["global_pool"] == "avg"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "options", "least"),
    [
        ("mini-vit", "sparsifiner", {"seen": 0.1}, 0.97),
        ("mini-vit", "dynamicvit", {"keep": 0.25}, 0.97),
        ("mini-dependencyvit", "dependencyvit", {"keep": 0.36}, 0.9),
    ],
)
def test_what_is_shipped_knows_what_matters(
    name: str, strategy: str, options: dict[str, Any], least: float
) -> None:
    model = shipped.load(name)[0]
    with vtprune.wrap(model, strategy, **options) as handle:
        assert f"{shipped.MODELS / name}" in str(handle.steps[0].strategy)
        right = mini_vit.right(model, 112)
    assert sum(right) >= least * len(right)


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stages = (Stage("map", 12, 4e-3, (), batch=2, warmup=2),)

    def begun(steps: int) -> SparsifinerTrainer:
        torch.manual_seed(0)
        trainer = SparsifinerTrainer(mini_vit.build_model(), tmp_path / "run", stages)
        trainer.stages = (Stage("map", steps, 4e-3, (), batch=2, warmup=2),)
        return trainer

    batch = shown(5, 2)
    before = begun(0).losses(stages[0], batch)["map"].item()
    first = begun(6)
    first._run_stage(first.stages[0])
    second = begun(12)
    assert second.step == 6
    second.run()
    assert second.losses(stages[0], batch)["map"].item() < before


def test_what_is_no_such_vit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mini-llava is no ViT of the shipped kind"):
        train_vits.train_vit("sparsifiner", "mini-llava", tmp_path / "x")
    with pytest.raises(ConfigError, match="there is no folder"):
        train_vits.train_vit("sparsifiner", "mini-vit", tmp_path / "no" / "x")


def test_options_of_other_trainers_are_refused() -> None:
    for option, said in (
        (["--dtype", "bfloat16"], "is trained in"),
        (["--form", "shared"], "form"),
    ):
        given = ["train", "sparsifiner", *option]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 2 and said in result.stderr
