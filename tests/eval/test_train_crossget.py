"""Training the tokens that guide CrossGET: what moves them, where they are found, what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vtprune
from vtprune.engine.reduction import reduced
from vtprune.errors import ConfigError
from vtprune.eval import mini_clip, mini_vit, shipped, train_clip, train_vits
from vtprune.eval.train_beside import FIRST
from vtprune.eval.train_crossget import CrossGETTrainer, Learning
from vtprune.eval.train_loop import Stage
from vtprune.eval.train_vit import Shown, shown
from vtprune.strategies.crossget import CROSS, CrossGET
from vtprune.types import Guidance, Selection, Signals, WideKeys

pytest.importorskip("timm")
pytest.importorskip("open_clip")
KINDS: dict[str, Any] = {"mini-vit": mini_vit, "mini-clip": mini_clip}
STAGES = (Stage("guide", 5, 1e-2, (), batch=2, warmup=2),)


@pytest.mark.parametrize("name", KINDS)
def test_every_token_learns_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = KINDS[name].build_model()
    trainer = CrossGETTrainer(model, tmp_path, (Stage("guide", 1, 1e-2, (), batch=4),))
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

    def weighed(query: Tensor, made: CrossGET) -> Tensor:
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


def test_an_interrupted_training_comes_to_the_same(tmp_path: Path) -> None:
    def trained(out: Path, shows: int) -> Tensor:
        trainer = CrossGETTrainer(shipped.load("mini-vit")[0], out, STAGES)

        def show(first: int, size: tuple[int, int]) -> Shown:
            if first >= FIRST + 2 * shows:
                raise KeyboardInterrupt
            return shown(first, 2)

        trainer.show = lambda stage, n: show
        trainer.run()
        return trainer.heads.tokens.detach()

    whole = trained(tmp_path / "whole", 5)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", 3)
    assert torch.equal(trained(tmp_path / "run", 5), whole) and whole.any()


def test_what_pulls_is_what_the_engine_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every block the guidance with a gradient is that without."""
    read: list[Tensor] = []
    live: list[Tensor] = []

    def watched(select: Any, to: list[Tensor]) -> Any:
        def inner(self: CrossGET, signals: Signals, k: int) -> Selection:
            to.append(signals.stack(Guidance)[-1])
            return select(self, signals, k)

        return inner

    monkeypatch.setattr(Learning, "select", watched(Learning.select, read))
    monkeypatch.setattr(CrossGET, "select", watched(CrossGET.select, live))
    trainer = CrossGETTrainer(mini_vit.build_model(), tmp_path, STAGES)
    trainer.losses(STAGES[0], shown(0, 2))
    assert len(read) == len(live) == 12
    assert all(x.requires_grad for x in live) and not any(x.requires_grad for x in read)
    torch.testing.assert_close(live, read)


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
        assert handle.steps[0].strategy == CrossGET(tokens=str(out))
    with pytest.raises(ConfigError, match="no ViT of the shipped kind"):
        train_vits.train_vit("crossget", "mini-llava", tmp_path / "x")


@pytest.mark.parametrize("name", KINDS)
def test_shipped_tokens_are_found_and_keep_what_the_model_says(name: str) -> None:
    model = shipped.load(name)[0]
    run = model.encode_image if name == "mini-clip" else model
    pixels = (shown if name == "mini-vit" else train_clip.shown)(700_000_000, 48).pixels

    def apart(**options: Any) -> float:
        with vtprune.wrap(model, "crossget", reduce=22, **options) as handle:
            file = str(shipped.MODELS / name / CROSS.file)
            assert options or handle.steps[0].strategy == CrossGET(tokens=file)
            return 1 - torch.cosine_similarity(run(pixels), whole).mean().item()

    with torch.no_grad():
        whole = run(pixels)
        assert apart() < 0.9 * apart(tokens=torch.zeros(12, 96))
