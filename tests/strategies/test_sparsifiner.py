"""Sparsifiner in whole ViTs: predictors, masks, patches that leave, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import vtprune
from tests.vits.models import DEPTH, PATCHES, answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.scoring.connectivity import Connectivity, connections
from vtprune.strategies.sparsifiner import PREDICTORS, Sparsifiner
from vtprune.trained import write


def predictors(tokens: int = PATCHES + 1, d: int = 16, depth: int = DEPTH) -> nn.ModuleList:
    torch.manual_seed(0)
    each = nn.ModuleList(Connectivity(tokens, d, 10) for _ in range(depth))
    for p in each.parameters():
        nn.init.normal_(p, std=0.3)
    return each.requires_grad_(False)


def masked(model: Any, made: nn.ModuleList, seen: int) -> torch.Tensor:
    """The answer of a ViT of timm whose attention is masked by hand."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
    for block, predictor in zip(model.blocks, made, strict=True):
        normed = block.norm1(x)
        q, k, v = block.attn.qkv(normed).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        mask = connections(cast(Connectivity, predictor).approximate(q, k), 1, seen, None)
        hidden = (q @ k.mT / 4).masked_fill(~mask, -torch.inf)
        x = x + block.attn.proj((hidden.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def test_each_query_attends_to_what_it_is_connected_to() -> None:
    model, made = build("vit"), predictors()
    with torch.no_grad():
        wanted = masked(model, made, 17)  # a quarter of 65, rounded up
    plain = answer(model, images())
    with wrap(model, "sparsifiner", predictors=made) as handle:
        torch.testing.assert_close(answer(model, images()), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, plain, rtol=1e-2, atol=1e-2)
        report = handle.report()
        assert report.images[0].kept == PATCHES
        assert report.tower(theoretical=True).share < report.tower().share == 1
    with wrap(model, "sparsifiner", predictors=made, seen=1.0):
        torch.testing.assert_close(answer(model, images()), plain, rtol=1e-5, atol=1e-5)


def test_patches_leave_by_the_masked_attention_of_cls() -> None:
    model, made = build("vit"), predictors()
    with wrap(model, "sparsifiner", predictors=made, rate=0.7) as handle:
        answer(model, images())
        counted = [n - 1 for n, _ in handle._passage.counted]
        assert counted == [64, 64, 45]  # blocks 1 and 2 of 3 are 3, 6 and 9 of 12
        assert handle.report().images[0].kept == 32
        state = handle._passage.entering[-1]
        assert state.index is not None
        assert torch.equal(state.tokens["place"][:, 1:] - 1, state.index)


def test_it_takes_no_budget_and_predictors_that_fit(tmp_path: Path) -> None:
    model, made = build("vit"), predictors()
    budgets: list[dict[str, Any]] = [{"keep": 0.5}, {"reduce": 4}]
    for budget in budgets:
        with pytest.raises(ConfigError, match="no token leaves because of sparsifiner"):
            vtprune.wrap(model, "sparsifiner", predictors=made, **budget)
    with pytest.raises(ConfigError, match="no predictors for this model"):
        vtprune.wrap(model, "sparsifiner")
    with pytest.raises(ConfigError, match="for 2 blocks"):
        vtprune.wrap(model, "sparsifiner", predictors=predictors(depth=2))
    odd = wrap(model, "sparsifiner", predictors=predictors(tokens=50))
    with odd, pytest.raises(UnsupportedError, match="know 50 tokens, but an image has 65"):
        answer(model, images())
    file = tmp_path / "odd.safetensors"
    write({"0.down": torch.zeros(3, 4)}, file)
    with pytest.raises(ConfigError, match="holds no predictors that fit together"):
        vtprune.wrap(model, "sparsifiner", predictors=str(file))


def test_predictors_beside_a_model_are_found(tmp_path: Path) -> None:
    model, made = build("ViTForImageClassification"), predictors()
    write(made.state_dict(), tmp_path / PREDICTORS.file)
    with wrap(model, "sparsifiner", predictors=made):
        wanted = answer(model, images())
    model.config.name_or_path = str(tmp_path)
    with wrap(model, "sparsifiner"):
        torch.testing.assert_close(answer(model, images()), wanted)


def test_images_are_by_themselves_and_nan_does_no_harm() -> None:
    model, made = build("vit"), predictors()
    x = images(3)
    with wrap(model, "sparsifiner", predictors=made, rate=0.5):
        together = answer(model, x)
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        x[0, 0, 0, 0] = torch.nan
        torch.testing.assert_close(answer(model, x)[1:], together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    model, made = build("vit"), predictors()
    with wrap(model, "sparsifiner", predictors=made):
        assert_one_graph(model, images())


def test_it_is_of_vits_alone() -> None:
    model, _ = tiny.build("llava")
    with pytest.raises(UnsupportedError, match="sparsifiner needs Attention"):
        vtprune.wrap(model, "sparsifiner")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": 0.0}, "seen=0.0 is no share"),
        ({"rate": 1.5}, "rate=1.5 is no share"),
        ({"seen": float("nan")}, "seen=nan is no share"),
        ({"at": ()}, "at=\\(\\): give blocks"),
        ({"at": (12,)}, "at=\\(12,\\): give blocks"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sparsifiner(**options)
