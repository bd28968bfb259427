"""DependencyViT in whole ViTs: messages, the quietest that leave, leaves of any ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.vits.models import DEPTH, PATCHES, SMALL, answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.scoring.messages import Messenger
from vtprune.strategies.dependencyvit import MESSENGERS, DependencyViT
from vtprune.trained import write
from vtprune.types import Facts, Received, Signals


def messengers(depth: int = DEPTH) -> nn.ModuleList:
    torch.manual_seed(0)
    each = nn.ModuleList(Messenger(48, 3) for _ in range(depth))
    for p in each.parameters():
        nn.init.normal_(p, std=0.2)
    return each.requires_grad_(False)


def averaging() -> Any:
    """A ViT that averages patches after its last norm, and has nothing else."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, **options)
    for p in model.parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=1.2 / p[0].numel() ** 0.5)
    return model.eval()


@torch.no_grad()
def lite(model: Any, made: nn.ModuleList, keep: list[int]) -> Tensor:
    """The answer with attention turned around by hand, image by image."""
    answers = []
    for image in images():
        x = model._pos_embed(model.patch_embed(image[None]))[0]
        m = torch.ones(len(x))
        for block, each, n in zip(model.blocks, made, keep, strict=True):
            messenger, normed = cast(Messenger, each), block.norm1(x)
            q, k, v = block.attn.qkv(normed).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)
            f = (q @ k.mT / 4).softmax(-1)
            p = (messenger.heads(normed) / 0.1).softmax(-1)  # [N, H]
            m = m * messenger.control(normed[None])[0]
            r = f.mT * p.T[:, None] * m  # [H, receiver, sender]
            torch.testing.assert_close(r.sum((0, 1)), m)
            x = x + block.attn.proj((r @ v).transpose(0, 1).flatten(1))
            left = m.sort(descending=True, stable=True).indices[:n].sort().values
            x, m = x[left], m[left]
            x = x + block.mlp(block.norm2(x))
        answers.append(model.head((model.norm(x) * m[:, None]).mean(0, keepdim=True)))
    return torch.cat(answers)


@pytest.mark.parametrize("left", [[PATCHES] * 3, [49, 35, 20]])
def test_messages_are_those_of_the_paper(left: list[int]) -> None:
    model, made = averaging(), messengers()  # blocks 1, 4, 7 and 10 of 12 are 0, 1 and 2 of 3
    with wrap(model, "dependencyvit", keep=left[-1], messengers=made) as handle:
        torch.testing.assert_close(
            answer(model, images()), lite(model, made, left), rtol=1e-4, atol=1e-5
        )
        assert handle.report().images[0].kept == left[-1]
    assert not torch.allclose(answer(model, images()), lite(model, made, left), atol=1e-2)


def test_the_published_share_is_left_in_the_published_blocks() -> None:
    facts = Facts(12, 11, True, Facts.signals_of(cls_row=True), n_tokens=196)
    stages = DependencyViT().plan(facts)
    assert [stage.layer for stage in stages] == [1, 4, 7, 10]
    assert all(stage.before_mlp and stage.attend is None for stage in stages)
    shares = [stage.times(0.36) for stage in stages if callable(stage.times)]
    assert shares == pytest.approx([1 - 0.16 * t for t in (1, 2, 3, 4)])


def test_the_leaves_of_any_vit_are_those_that_receive_least() -> None:
    model = build("vit")
    received = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    signals = Signals(torch.zeros(2, 9, 4), values={Received(3): received})
    chosen = vtprune.select("dependencyvit", keep=4, signals=signals)
    assert torch.equal(chosen.rows, received.topk(4).indices.sort().values)
    plain = answer(model, images())
    with wrap(model, "dependencyvit", keep=1.0):
        assert torch.equal(answer(model, images()), plain)
    with wrap(model, "dependencyvit", keep=30) as handle:
        assert not torch.equal(answer(model, images()), plain)
        assert handle.report().images[0].kept == 30


def test_messengers_beside_a_model_are_found(tmp_path: Path) -> None:
    model, made = build("Dinov2ForImageClassification"), messengers()
    write(made.state_dict(), tmp_path / MESSENGERS.file)
    with wrap(model, "dependencyvit", keep=0.5, messengers=made):
        wanted = answer(model, images())
    model.config.name_or_path = str(tmp_path)
    with wrap(model, "dependencyvit", keep=0.5):
        torch.testing.assert_close(answer(model, images()), wanted)
    with pytest.raises(ConfigError, match="are for 2 blocks"):
        vtprune.wrap(model, "dependencyvit", keep=0.5, messengers=messengers(2))


def test_images_are_by_themselves_and_nan_does_no_harm() -> None:
    model, x = averaging(), images(3)
    with wrap(model, "dependencyvit", keep=0.4, messengers=messengers()):
        together = answer(model, x)
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        x[0, 0, 0, 0] = torch.nan
        torch.testing.assert_close(answer(model, x)[1:], together[1:], rtol=1e-4, atol=1e-5)


def test_everything_learns_through_a_wrapped_vit() -> None:
    model, made = averaging(), messengers().requires_grad_(True)
    with wrap(model, "dependencyvit", keep=0.4, messengers=made):
        model(images()).square().sum().backward()
    for name, p in [*model.named_parameters(), *made.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert float(p.grad.abs().sum()) > 0, name


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    model = averaging()
    with wrap(model, "dependencyvit", keep=0.4, messengers=messengers()):
        assert_one_graph(model, images())


def test_messages_are_of_vits_alone() -> None:
    model, _ = tiny.build("llava")
    vtprune.wrap(model, "dependencyvit", keep=0.5).remove()
    blocks = model.config.vision_config.num_hidden_layers
    with pytest.raises(UnsupportedError, match="dependencyvit needs Attention"):
        vtprune.wrap(model, "dependencyvit", keep=0.5, messengers=messengers(blocks))
