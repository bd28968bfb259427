"""Towers, and signals that satisfy whatever a strategy asks of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vtprune.registry import build, strategy_names
from vtprune.types import (
    ClsRow,
    EachHead,
    EachText,
    Facts,
    Flow,
    Frames,
    Guidance,
    Inside,
    InstructionText,
    KeyNorm,
    Keys,
    LastFlow,
    LastRow,
    LayerKeys,
    Likeness,
    Maps,
    Need,
    Normed,
    Quantity,
    Received,
    RowRule,
    Selection,
    Signals,
    Site,
    Spans,
    Strategy,
    TextPeak,
    TextRows,
    TextState,
    Transition,
    Turned,
    ValueNorm,
    VisualRows,
    WideClsRow,
    WideKeys,
)

WIDTH = 16
TOWERS = {
    name: Facts(
        vision_layers=12,
        feature_block=10,
        has_cls=has_cls,
        signals=Facts.signals_of(cls_row=has_cls) | {Frames},
        n_tokens=36 if has_cls else None,  # so that a stage for images of any size is here too
        decoder_layers=12,
        family=f"a tower {name}",
    )
    for name, has_cls in {"with CLS": True, "without CLS": False}.items()
}
# For strategies that no tower of a language model can serve: they read whole attention maps.
NEEDS_MAPS = {"zero_tprune"}
# Those, and strategies for which only shipped ViTs have weights.
OF_VITS = NEEDS_MAPS | {"dynamicvit", "sparsifiner"}
# Those that compare frames of videos.
NEEDS_FRAMES = {
    name
    for name in strategy_names()
    if any(Frames() in stage.needs for stage in build(name).plan(TOWERS["with CLS"]))
}
# Those whose rules say what visual rows compute, not what becomes of attention.
BY_ROWS = {
    name
    for name in strategy_names()
    if any(isinstance(s.rule, RowRule) for s in build(name).plan(TOWERS["with CLS"]))
}
# Those that a language model with images alone cannot be given.
ELSEWHERE = NEEDS_MAPS | NEEDS_FRAMES
BY_ITSELF = "of a ViT by itself"
EVERY = TOWERS | {
    BY_ITSELF: replace(
        TOWERS["with CLS"],
        feature_block=11,
        signals=TOWERS["with CLS"].signals - {Frames} | {Maps},
        decoder_layers=0,
        family="a ViT by itself",
    )
}


def _value(need: Need, batch: int, n: int, generator: torch.Generator) -> Tensor:
    if isinstance(need, Spans):  # of one video, without those of the others
        frames = torch.arange(n) // _clip(n)[2]
        return torch.stack([frames * 0, frames, frames], 1).float().expand(batch, -1, -1)
    if isinstance(need, (ClsRow, LastRow, Received, TextPeak, TextRows, VisualRows, WideClsRow)):
        return torch.randn(batch, n, generator=generator).softmax(-1)
    if isinstance(need, Flow):
        return torch.rand(batch, n, 2, generator=generator)
    if isinstance(need, Maps):
        return torch.randn(batch, 2, n, n, generator=generator).softmax(-1)
    if isinstance(need, (Guidance, KeyNorm, LastFlow, Likeness, Transition, ValueNorm)):
        return torch.rand(batch, n, generator=generator)
    if isinstance(need, TextState):
        return torch.randn(batch, 2 * WIDTH, generator=generator)
    if isinstance(need, Normed):
        return torch.randn(batch, n, WIDTH, generator=generator)
    if isinstance(need, EachHead):
        return torch.rand(batch, n, batch + 3, 4, generator=generator)
    if isinstance(need, EachText):
        return torch.rand(batch, n, batch + 3, generator=generator)
    if isinstance(need, (Keys, LayerKeys, Turned, WideKeys)):
        return torch.randn(batch, n, 8, generator=generator)
    raise NotImplementedError(f"Say here what random {need} look like.")


def _square(n: int) -> tuple[int, int, int] | None:
    side = round(n**0.5)
    return (1, side, side) if side * side == n else None


def _clip(n: int) -> tuple[int, int, int]:
    """As few frames as there can be, but at least three where there are tokens for them."""
    frames = next((t for t in range(3, n) if n % t == 0), n)
    return frames, 1, n // frames


def make_signals(strategy: Strategy, facts: Facts, batch: int, n: int, seed: int = 0) -> Signals:
    """Random tokens ``[batch, n, 16]`` and all that the strategy's stages need.

    Of those that act at two sites: with a CLS what the first needs, without one the second.
    """
    generator = torch.Generator().manual_seed(seed)
    stages = strategy.plan(facts)
    site = stages[0 if facts.has_cls else -1].site
    stages = [stage for stage in stages if stage.site is site]
    needs = {need for stage in stages for need in stage.needs}
    signals = Signals(
        tokens=torch.randn(batch, n, WIDTH, generator=generator),
        grid=_clip(n) if Frames() in needs else _square(n),
        item=torch.arange(batch),
    )
    if InstructionText() in needs:
        signals.text = [torch.randn(b + 1, WIDTH, generator=generator) for b in range(batch)]
    read = sorted((need for need in needs if isinstance(need, Quantity)), key=repr)
    signals.values = {need: _value(need, batch, n, generator) for need in read}
    signals.size = torch.randint(1, 5, (batch, n), generator=generator).float()
    layers = tuple(stage.layer or 0 for stage in stages if stage.site is Site.DECODER)
    if layers:
        after = tuple(
            {need: _value(need, 1, row + 3, generator)[0] for need in read} for row in range(batch)
        )
        entered, starts, images = (n,) * batch, (2,) * batch, ((n,),) * batch
        signals.inside = Inside(0, layers, facts.decoder_layers, entered, starts, after, images)
    return signals


def constant(signals: Signals) -> Signals:
    """The signals of the first token, everywhere."""

    def same_for_all(need: Need, value: Tensor) -> Tensor:
        if isinstance(need, Maps):
            return torch.full_like(value, 1 / signals.n)
        return value[:, :1].expand_as(value)

    return replace(
        signals,
        tokens=signals.tokens[:, :1].expand_as(signals.tokens),
        values={need: same_for_all(need, v) for need, v in signals.values.items()},
        size=None if signals.size is None else signals.size[:, :1].expand_as(signals.size),
    )


def cast(signals: Signals, dtype: torch.dtype) -> Signals:
    """The signals rounded to ``dtype``."""
    return replace(
        signals,
        tokens=signals.tokens.to(dtype),
        values={need: v.to(dtype) for need, v in signals.values.items()},
        text=None if signals.text is None else [t.to(dtype) for t in signals.text],
    )


def broken(signals: Signals, rows: list[int], tokens: list[int]) -> Signals:
    """A copy with NaN in all that is known of these tokens of these rows."""
    at = (torch.tensor(rows)[:, None], torch.tensor(tokens))

    def spoil(x: Tensor) -> Tensor:
        return x.clone().index_put(at, torch.tensor(float("nan")))

    def spoil_maps(x: Tensor) -> Tensor:
        return spoil(spoil(x.permute(0, 3, 2, 1)).permute(0, 2, 1, 3)).permute(0, 3, 1, 2)

    values = {
        need: spoil_maps(v) if isinstance(need, Maps) else spoil(v)
        for need, v in signals.values.items()
    }
    return replace(signals, tokens=spoil(signals.tokens), values=values)


def same(a: Selection, b: Selection) -> bool:
    """Whether two selections are equal, the weights of their mix included."""
    if a.n != b.n or not torch.equal(a.rows, b.rows) or (a.mix is None) != (b.mix is None):
        return False
    if a.mix is None or b.mix is None:
        return True
    edges = [(m.source, m.target, m.weight) for m in (a.mix, b.mix)]
    return all(torch.equal(x, y) for x, y in zip(*edges, strict=True))


def unweighted(selection: Selection) -> Selection:
    """The selection with all weights of its mix at 1."""
    mix = selection.mix
    return replace(selection, mix=mix and replace(mix, weight=torch.ones_like(mix.weight)))


def assert_valid(selection: Selection, batch: int, n: int, k: int, facts: Facts) -> None:
    """Asserts an exact count of distinct rows in range, and outputs made of what there is."""
    rows, slots = selection.rows, selection.slots
    assert selection.n == n
    assert rows.shape == slots.shape == (batch, k)
    assert rows.dtype == slots.dtype == torch.int64
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        kept = [r for r in row if r != -1]
        assert len(set(kept)) == len(kept)
        assert all(0 <= r < n for r in kept)
        assert len(set(slot)) == k
        assert all(0 <= s < n for s in slot)
        assert [s for r, s in zip(row, slot, strict=True) if r != -1] == kept
    if selection.mix is None:
        assert (rows >= 0).all()
        return
    mix = selection.mix
    assert ((mix.source >= 0) & (mix.source < n + int(facts.has_cls))).all()
    assert ((mix.target >= 0) & (mix.target < k)).all()
    assert mix.weight.dtype == torch.float32
    assert mix.weight.isfinite().all()
    assert all(set(row) == set(range(k)) for row in mix.target.tolist())  # no empty output
