"""MCTF: where it acts, what it weighs by, and that maps are merged ahead as the tokens are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.golden_harness import GoldenError, check, find_adapter, find_cases
from tests.test_golden import SHIPPED
from tests.vits.models import PATCHES, answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError
from vtprune.registry import build as strategy
from vtprune.scoring.criteria import Traits
from vtprune.types import Facts, Maps, Received, Signals, Site

TOWER = Facts(24, 22, True, Facts.signals_of(cls_row=True))
ALONE = replace(TOWER, feature_block=23, signals=TOWER.signals | {Maps})


def test_it_acts_ahead_in_a_vit_by_itself_and_behind_in_a_tower() -> None:
    for facts, ahead, last in ((ALONE, True, 23), (TOWER, False, 22)):
        stages = strategy("mctf").plan(facts)
        assert [stage.layer for stage in stages] == list(range(1, last + 1))
        assert all(s.needs == (Received(s.layer or 0),) for s in stages)
        assert all(s.ahead is ahead and not s.before_mlp and s.proportional for s in stages)
    assert not strategy("mctf", one_step_ahead=False).plan(ALONE)[0].ahead
    (stage,) = strategy("mctf").plan(replace(TOWER, in_tower=False))
    assert stage.site is Site.PROJECTOR


@pytest.mark.parametrize(
    "options", [{"tau_size": 0}, {"tau_likeness": float("nan")}, {"pool": "max"}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        strategy("mctf", **options)


@pytest.mark.parametrize(("pool", "mean"), [("attention", 7.0), ("size", 6.0), ("mean", 4.0)])
def test_what_weighs_in_a_mean(pool: str, mean: float) -> None:
    tokens = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]])
    signals = Signals(
        tokens,
        values={Received(0): torch.tensor([[0.7, 0.3]])},
        size=torch.tensor([[3.0, 1.0]]),
    )
    merged = vtprune.select("mctf", keep=1, signals=signals, pool=pool).apply(tokens)
    assert merged[0, 0, 0] == pytest.approx(mean)


def test_the_map_of_a_block_is_that_of_what_enters_it() -> None:
    """Block 1 by hand: softmax of all tokens, columns added up, rows averaged, merged values."""
    model, x = build("vit"), images()
    states: list[Any] = []
    with wrap(model, "mctf", reduce=[0, 20], layers=(1,)) as handle:
        hook = model.blocks[0].register_forward_hook(lambda m, a, out: states.append(out))
        handle_out: list[Any] = []
        last = model.blocks[1].register_forward_hook(lambda m, a, out: handle_out.append(out))
        answer(model, x)
        hook.remove()
        last.remove()
        selections = handle.selections
    block, entered = model.blocks[1], states[0].detach().double()
    block = block.double()
    with torch.no_grad():
        qkv = block.attn.qkv(block.norm1(entered)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        maps = (qkv[0] @ qkv[1].mT / 4).softmax(-1)
        received = maps.mean((1, 2))[:, 1:]
        for b, chosen in enumerate(selections):
            n = chosen.rows.shape[1]
            assert chosen.mix is not None
            into = torch.zeros(PATCHES, dtype=torch.int64)
            into[chosen.mix.source[0]] = chosen.mix.target[0]
            mean = torch.zeros(n + 1, PATCHES + 1, dtype=torch.float64)
            mean[0, 0], mean[into + 1, torch.arange(PATCHES) + 1] = 1, received[b]
            mean = mean / mean.sum(1, keepdim=True)
            merged = mean @ maps[b] @ (mean > 0).double().mT
            made = mean @ entered[b]
            value = (
                block.attn.qkv(block.norm1(made)).unflatten(-1, (3, 3, 16))[:, 2].transpose(0, 1)
            )
            made = made + block.attn.proj((merged @ value).transpose(0, 1).flatten(1))
            made = made + block.mlp(block.norm2(made))
            ours = handle_out[0][b].detach().double()
            order = torch.cdist(made, ours).argmin(1)
            assert len(order.unique()) == n + 1
            torch.testing.assert_close(ours[order], made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["siglip_map", "dinov3", "open_clip"])
@pytest.mark.slow
def test_it_compiles_to_one_graph(name: str) -> None:
    model, x = build(name), images()
    with wrap(model, "mctf", reduce=8):
        assert_one_graph(model, x)


def test_a_fault_turns_the_recorded_cases_red(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, cases = find_adapter("mctf"), find_cases(SHIPPED / "mctf")
    assert not isinstance(adapter, str)

    def unweighted(tokens: Any, received: Any, size: Any, weight: Any) -> Traits:
        return Traits(tokens, received, torch.ones_like(size), torch.ones_like(weight))

    monkeypatch.setattr("vtprune.strategies.mctf.Traits", unweighted)
    for case in cases:
        with pytest.raises(GoldenError, match="differs"):
            check(case, adapter)
