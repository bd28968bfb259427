"""How many tokens leave which block of a ViT, and what it is decided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vits.models import (
    PATCHES,
    answer,
    build,
    images,
    wrap,
)
from vtprune.strategies.random import Random
from vtprune.strategies.tome import ToMe
from vtprune.types import Keys, Patches, Selection, Signals, Stage


@pytest.mark.parametrize(
    ("amount", "left"),
    [
        ({"reduce": 5}, (59, 54, 49)),
        ({"reduce": (5, -1.0)}, (54, 49, 49)),
        ({"reduce": (5, 1.0)}, (64, 59, 49)),
        ({"reduce": [1, 30]}, (63, 33, 33)),
        ({"reduce": 40}, (32, 16, 8)),
        ({"keep": 20}, (49, 34, 20)),
        ({"keep": 0.25}, (48, 32, 16)),
    ],
)
@pytest.mark.parametrize("strategy", ["tome", "random"])
def test_schedules(strategy: str, amount: Any, left: tuple[int, ...]) -> None:
    model = build("CLIPVisionModel")
    with wrap(model, strategy, **amount) as handle:
        answer(model, images())
        assert handle.report().tiles[0].passed == tuple(n + 1 for n in left)


@pytest.mark.parametrize("strategy", ["tome", "random"])
@pytest.mark.parametrize("saved", [0.2, 0.4])
def test_a_share_of_operations_is_saved(strategy: str, saved: float) -> None:
    for name in ("CLIPVisionModel", "vit", "eva02_split"):
        with wrap(build(name), strategy, reduce=saved) as handle:
            answer(handle.model, images())
            assert saved <= 1 - handle.report().tower().share < saved + 0.02


def test_layers_are_those_to_act_in() -> None:
    model = build("CLIPVisionModel")
    for strategy in ("tome", "random", "fastervlm"):
        with wrap(model, strategy, keep=20, layers=(1,)) as handle:
            answer(model, images())
            assert handle.report().tiles[0].passed == (65, 21, 21)
            assert handle.report().layers == (1,)


def test_a_row_is_decided_alone_and_by_its_attention() -> None:
    model, x = build("vit"), images(3)
    with wrap(model, "fastervlm", keep=20, layers=(1,)) as handle:
        together = answer(model, x)
        kept = [s.rows[0] for s in handle.selections]
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        assert torch.equal(handle.selections[0].rows[0], kept[1])
    rows: list[Tensor] = []

    def look(module: Any, args: Any) -> None:
        rows.append(args[0])  # the weights, where attention is written out

    block = model.blocks[1]
    block.attn.fused_attn = False
    hook = block.attn.attn_drop.register_forward_pre_hook(look)
    answer(model, x)
    hook.remove()
    scores = rows[0][:, :, 0, 1:].mean(1)
    for score, chosen in zip(scores, kept, strict=True):
        assert torch.equal(score.topk(20).indices.sort().values, chosen)


def test_stages_read_what_earlier_blocks_gave_of_those_left() -> None:
    seen: list[Tensor] = []

    class Reads(Random):
        def plan(self, facts: Any) -> Any:
            stages = ToMe().plan(facts)
            own = (Patches(0),)
            return tuple(Stage(s.site, own, s.layer) for s in stages[1:])

        def score(self, signals: Signals) -> Tensor:
            seen.append(signals.stack(Patches)[0])
            return super().score(signals)

    model, x = build("CLIPVisionModel"), images()
    with wrap(model, Reads(), reduce=8) as handle:
        out: list[Tensor] = []
        hook = handle.adapter.blocks[0].register_forward_hook(lambda m, a, o: out.append(o))
        answer(model, x)
        hook.remove()
        state = handle._passage.entering[2]
    assert state.index is not None and torch.equal(seen[0], out[0][:, 1:])
    rows = state.index[..., None].expand(-1, -1, 48)
    assert torch.equal(seen[1], out[0][:, 1:].gather(1, rows))


@pytest.mark.parametrize("name", ["dinov3", "eva02_split", "rope_mixed"])
def test_keys_say_what_is_there_and_not_where(name: str) -> None:
    """A patch of the same content has the same keys anywhere: there is no rotary embedding."""
    seen: list[Tensor] = []

    class Looks(ToMe):
        def select(self, signals: Signals, k: int) -> Selection:
            seen.append(signals.stack(Keys)[-1])
            return super().select(signals, k)

    model = build(name)
    adapter: Any = None
    with wrap(model, Looks(), reduce=[8]) as handle:
        adapter = handle.adapter
        x = torch.randn(1, 1, 48).expand(2, PATCHES + adapter.n_prefix, -1)
        rope = model.rope.get_embed((8, 8))
        with torch.no_grad():
            adapter.blocks[0](x, rope=rope[0] if name == "rope_mixed" else rope)
    torch.testing.assert_close(seen[0], seen[0][:, :1].expand_as(seen[0]))
