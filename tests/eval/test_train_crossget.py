"""Training the tokens that guide CrossGET: what moves them, where they are found, what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vtprune
from vtprune.engine.reduction import reduced
from vtprune.errors import ConfigError
from vtprune.eval import mini_clip, mini_vit, shipped, train_clip, train_vits
from vtprune.eval.train_crossget import CrossGETTrainer, Learning
from vtprune.eval.train_loop import Stage, sum_losses
from vtprune.eval.train_vit import shown
from vtprune.strategies.crossget import CROSS, CrossGET
from vtprune.types import Guidance, Signals, WideKeys

pytest.importorskip("timm")
pytest.importorskip("open_clip")
KINDS: dict[str, Any] = {"mini-vit": mini_vit, "mini-clip": mini_clip}


def stages(steps: int) -> tuple[Stage, ...]:
    return (Stage("guide", steps, 1e-2, (), batch=4, warmup=2),)


@pytest.mark.parametrize("name", KINDS)
def test_every_token_learns_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = KINDS[name].build_model()
    trainer = CrossGETTrainer(model, tmp_path, stages(1))
    assert trainer.paces == [16, 22]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.run()
    (grown,) = trainer.heads.parameters()
    assert grown.shape == (12, 96) and grown.isfinite().all() and grown.any(1).all()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_a_merge_pull_at_the_guide() -> None:
    """Their gradient is the difference quotient, along a direction, of what they are."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 18, 4)  # [B, H, S, d], a [CLS] and the guide first
    along, counted = torch.randn_like(q), torch.randn(2, 16)
    keys = reduced(WideKeys(0), q, k, v, 2, None, None)

    def weighed(query: torch.Tensor, made: CrossGET) -> torch.Tensor:
        values = {WideKeys(0): keys, Guidance(0): reduced(Guidance(0), query, k, v, 2, None, None)}
        with torch.no_grad():  # as the engine asks
            chosen = made.select(Signals(torch.randn(2, 16, 8), values=values, n_prefix=2), 10)
        assert chosen.mix is not None
        return (counted * chosen.mix.weight).sum()

    query = q.clone().requires_grad_()
    found = weighed(query.detach(), Learning(latest=[(query, k, v)]))
    (gradient,) = torch.autograd.grad(found, query)
    step = 1e-3
    ahead, behind = (weighed(q + sign * step * along, CrossGET()) for sign in (1, -1))
    quotient = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * along).sum(), quotient, rtol=2e-3, atol=1e-3)
    assert gradient[:, :, 1].any() and not gradient[:, :, 2:].any()


@pytest.mark.parametrize("name", KINDS)
def test_training_lowers_the_loss_and_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    def begun(steps: int) -> CrossGETTrainer:
        return CrossGETTrainer(shipped.load(name)[0], tmp_path / "run", stages(steps))

    batch = (shown if name == "mini-vit" else train_clip.shown)(5, 4)
    first = begun(4)
    first.paces = [22]
    before = sum_losses(first.losses(first.stages[0], batch)).item()
    first._run_stage(first.stages[0])
    second = begun(12)
    second.paces = [22]
    assert second.step == 4 and second.heads.tokens.any()
    second.show = lambda stage, n: lambda number, size: batch
    second.run()
    assert sum_losses(second.losses(second.stages[0], batch)).item() < before


@pytest.mark.parametrize("name", KINDS)
def test_what_is_trained_is_found_beside_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_vits, "BATCH", 2)
    KINDS[name].save(KINDS[name].build_model(), tmp_path / "vit")
    out = tmp_path / "vit" / CROSS.file
    train_vits.train_vit("crossget", str(tmp_path / "vit"), out, samples=4)
    assert load_file(out)["tokens"].shape == (12, 96)
    assert len((tmp_path / "vit" / f"{CROSS.file}.training" / "checkpoint.pt").read_bytes()) > 0
    model = shipped.load(str(tmp_path / "vit"))[0]
    with vtprune.wrap(model, "crossget", reduce=16) as handle:
        assert handle.plan.strategy == CrossGET(tokens=str(out))
    with pytest.raises(ConfigError, match="no ViT of the shipped kind"):
        train_vits.train_vit("crossget", "mini-llava", tmp_path / "x")
