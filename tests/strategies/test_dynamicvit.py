"""DynamicViT in whole ViTs and in the tower of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.vits.models import PATCHES, answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.eval import tiny
from vtprune.scoring.keeping import Keeper
from vtprune.strategies.dynamicvit import KEEPERS, DynamicViT
from vtprune.trained import write
from vtprune.types import Budget, Facts, Inside, Signals


def keepers(width: int = 48, heads: int = 2) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Keeper(width) for _ in range(heads)).requires_grad_(False).eval()


@torch.no_grad()
def thinned(model: Any, made: nn.ModuleList, keep: dict[int, int]) -> Tensor:
    """The answer with patches taken away by hand before some blocks, image by image."""
    answers, waiting = [], list(made)
    for image in images():
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        for layer, block in enumerate(model.blocks):
            if layer in keep:
                keeper = cast(Keeper, waiting[list(keep).index(layer)])
                score = keeper(x[None, 1:])[0, :, 0]
                left = score.sort(descending=True, stable=True).indices[: keep[layer]]
                x = x[torch.cat([torch.zeros(1, dtype=torch.int64), left.sort().values + 1])]
            x = block(x[None])[0]
        answers.append(model.forward_head(model.norm(x[None])))
    return torch.cat(answers)


def test_patches_leave_before_the_blocks() -> None:
    model, made = build("vit"), keepers()
    wanted = thinned(model, made, {1: 32, 2: 16})
    with wrap(model, "dynamicvit", keep=16, keepers=made) as handle:
        torch.testing.assert_close(answer(model, images()), wanted, rtol=1e-4, atol=1e-5)
        assert handle.report().images[0].kept == 16
    plain = answer(model, images())
    with wrap(model, "dynamicvit", keep=1.0, keepers=made):
        assert torch.equal(answer(model, images()), plain)


@pytest.mark.parametrize("rho", [0.7, 0.5])
def test_counts_are_those_of_the_authors(rho: float) -> None:
    facts = Facts(12, 11, True, Facts.signals_of(cls_row=True), n_tokens=196)
    layers = DynamicViT().used_layers(facts)
    assert layers == (2, 5, 8)
    found = []
    for stage in range(3):
        inside = Inside(stage, layers, 12, (196,))
        signals = Signals(torch.zeros(1, 196, 4), inside=inside)
        found += DynamicViT().counts(signals, Budget(tokens=int(196 * rho**3)))
    assert found == pytest.approx([int(196 * rho**t) for t in (1, 2, 3)], abs=1)
    assert found[-1] == int(196 * rho**3)


def test_keepers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = build("vit")
    with pytest.raises(ConfigError, match="no keepers for this model"):
        vtprune.wrap(model, "dynamicvit", keep=0.5)
    with pytest.raises(ConfigError, match="are 3 heads, but patches leave after 2 blocks"):
        vtprune.wrap(model, "dynamicvit", keep=0.5, keepers=keepers(heads=3))
    odd = wrap(model, "dynamicvit", keep=0.5, keepers=keepers(32))
    with odd, pytest.raises(InputError, match="judge states of 32 values, but these have 48"):
        answer(model, images())
    file = tmp_path / "odd.safetensors"
    write({"a": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match="holds no keepers that fit together"):
        vtprune.wrap(model, "dynamicvit", keep=0.5, keepers=str(file))


def test_keepers_beside_a_model_are_found(tmp_path: Path) -> None:
    model, made = build("ViTForImageClassification"), keepers()
    write(made.state_dict(), tmp_path / KEEPERS.file)
    with wrap(model, "dynamicvit", keep=0.4, keepers=made):
        wanted = answer(model, images())
    model.config.name_or_path = str(tmp_path)
    with wrap(model, "dynamicvit", keep=0.4):
        torch.testing.assert_close(answer(model, images()), wanted)


def test_images_are_by_themselves_and_nan_does_no_harm() -> None:
    model, x = build("vit"), images(3)
    with wrap(model, "dynamicvit", keep=0.4, keepers=keepers()):
        together = answer(model, x)
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        x[0, 0, 0, 0] = torch.nan
        torch.testing.assert_close(answer(model, x)[1:], together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    model = build("vit")
    with wrap(model, "dynamicvit", keep=0.4, keepers=keepers()):
        assert_one_graph(model, images())


def test_where_towers_cannot_be_cut_it_is_refused() -> None:
    model, _ = tiny.build("qwen2_5_vl")
    with pytest.raises(UnsupportedError, match="lets patches leave inside the tower"):
        vtprune.wrap(model, "dynamicvit", keep=0.5, keepers=keepers())


def test_a_tie_goes_to_the_lower_index() -> None:
    same = Signals(torch.ones(2, PATCHES, 48))
    chosen = vtprune.select("dynamicvit", keep=9, signals=same, keepers=keepers())
    assert chosen.rows.tolist() == [list(range(9))] * 2
