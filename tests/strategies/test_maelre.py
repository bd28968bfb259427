"""MAELRE: it merges while an image is long, and leaves later blocks as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests.vits.models import answer, build, images, wrap
from vtprune.errors import ConfigError
from vtprune.registry import build as strategy
from vtprune.types import Budget, Facts, Inside, Keys, Maps, Signals

TOWER = Facts(12, 11, True, Facts.signals_of(cls_row=True))


def counts(keep: float | int, n: int, blocks: int = 12, **options: float) -> list[int]:
    found, left = [], n
    for stage in range(blocks):
        inside = Inside(stage, tuple(range(blocks)), blocks, (n,))
        signals = Signals(torch.zeros(1, left, 1), inside=inside)
        (left,) = strategy("maelre", **options).counts(signals, Budget.of(keep))
        found.append(left)
    return found


def test_it_acts_ahead_in_every_block_of_a_vit_by_itself() -> None:
    for facts, ahead in ((replace(TOWER, signals=TOWER.signals | {Maps}), True), (TOWER, False)):
        stages = strategy("maelre").plan(facts)
        assert [stage.layer for stage in stages] == list(range(12))
        assert [stage.needs for stage in stages] == [(Keys(i),) for i in range(12)]
        assert all(stage.ahead is ahead and not stage.before_mlp for stage in stages)


def test_a_share_merges_until_an_image_is_short() -> None:
    assert counts(98, 196) == [157, 126, 101, *[98] * 9]
    assert counts(0.5, 196) == counts(98, 196)
    assert counts(0.5, 196, share=0.1)[:4] == [177, 160, 144, 130]
    assert counts(196, 196) == [196] * 12


def test_blocks_merge_more_where_their_share_would_not_do() -> None:
    assert counts(9, 64, 3) == [34, 18, 9]
    assert counts(1, 64, 3)[-1] == 1


def test_short_images_are_attended_exactly() -> None:
    """Blocks after the last merge are the model's own, on what is left."""
    model, x = build("vit"), images()
    states: list[torch.Tensor] = []
    with wrap(model, "maelre", keep=52, prop_attn=False) as handle:
        hooks = [
            b.register_forward_hook(lambda m, a, out: states.append(out)) for b in model.blocks
        ]
        answer(model, x)
        assert handle.report().tiles[0].attended == (65, 53, 53)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(states[2], model.blocks[2](states[1]), rtol=1e-4, atol=1e-4)


def test_a_merge_is_that_of_tome() -> None:
    generator = torch.Generator().manual_seed(0)
    signals = Signals(
        torch.randn(2, 30, 4, generator=generator),
        values={Keys(0): torch.randn(2, 30, 8, generator=generator)},
        n_prefix=1,
    )
    ours, other = (vtprune.select(name, keep=20, signals=signals) for name in ("maelre", "tome"))
    assert torch.equal(ours.rows, other.rows)
    assert torch.equal(ours.apply(signals.tokens), other.apply(signals.tokens))


@pytest.mark.parametrize("share", [0.0, 0.6, float("nan")])
def test_options_out_of_range(share: float) -> None:
    with pytest.raises(ConfigError, match="share="):
        strategy("maelre", share=share)
