"""One selection among recorded states of a ViT, and the outputs that recorded cases ask of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.engine.reduction import reduced
from vtprune.types import ClsRow, Inside, Keys, Quantity, Selection, Signals, Strategy


class Merge:
    """Recorded states ``in.x`` ``[B, prefix + N, C]`` with what goes with them.

    Attributes:
        signals: of block 0, without a place among blocks.
        size: ``[B, prefix + N]``.
    """

    def __init__(self, tensors: Tensors, n_prefix: int) -> None:
        self.tensors, self.p, self.x = tensors, n_prefix, tensors["in.x"]
        self.size = self.x.new_ones(self.x.shape[:2])
        if "in.size" in tensors:
            self.size = tensors["in.size"][..., 0]
        values: dict[Quantity, Tensor] = {}
        if "in.q" in tensors:
            q, k = tensors["in.q"], tensors["in.k"]
            added = self.size.log()[:, None, None] if "in.size" in tensors else None
            values[ClsRow(0)] = reduced(ClsRow(0), q, k, k, n_prefix, None, added)
        elif "in.k" in tensors:
            values[Keys(0)] = tensors["in.k"].mean(1)[:, n_prefix:]
        self.signals = Signals(
            self.x[:, n_prefix:],
            values=values,
            n_prefix=n_prefix,
            size=self.size[:, n_prefix:],
        )

    @property
    def keys(self) -> Tensor:
        return self.signals.stack(Keys)[0]

    def at(self, layer: int, depth: int) -> Signals:
        """Returns the signals in one of several blocks, the only one where something happens."""
        entered = (self.signals.n,) * len(self.x)
        return replace(self.signals, inside=Inside(0, (layer,), depth, entered))

    def run(self, strategy: Strategy, k: int, signals: Signals | None = None) -> dict[str, Output]:
        """Lets ``strategy`` leave ``k`` patches; returns the outputs that the case has."""
        signals = signals or self.signals
        return self.outputs(vtprune.select(strategy, keep=k, signals=signals))

    def outputs(self, selection: Selection) -> dict[str, Output]:
        """Returns the outputs that the case has, ours and the recorded ones in ascending order."""
        p, prefix = self.p, torch.arange(self.p).expand(len(self.x), self.p)
        rows, place = selection.rows.sort(dim=1)
        keep = torch.cat([prefix, rows + p], dim=1)
        ours = torch.cat([prefix, place + p], dim=1)
        into = torch.cat([prefix, into_of(selection) + p], dim=1)
        at = torch.cat([prefix, selection.rows + p], dim=1)
        owner = at.gather(1, into.clamp(min=0)).masked_fill(into < p, -1)
        owner[:, :p] = prefix
        tokens = torch.cat([self.x[:, :p], selection.apply(self.x[:, p:])], dim=1)
        sizes = torch.cat([self.size[:, :p], selection.counted(self.size[:, p:])], dim=1)
        recorded = self.tensors["out.order"].argsort(dim=1)
        both: dict[str, Output] = {
            "out.keep": keep,
            "out.order": (keep, self.tensors["out.order"].sort(dim=1).values),
            "out.owner": owner,
            "out.tokens": (rows_of(tokens, ours), rows_of(self.tensors["out.tokens"], recorded)),
        }
        if "out.size" in self.tensors:
            recorded_sizes = rows_of(self.tensors["out.size"], recorded)
            both["out.size"] = (rows_of(sizes[..., None], ours), recorded_sizes)
        return both


def into_of(selection: Selection) -> Tensor:
    """Returns the output that each token goes into, ``[B, N]``, -1 for none."""
    batch, k = selection.rows.shape
    into = torch.full((batch, selection.n), -1)
    if selection.mix is None:
        return into.scatter(1, selection.rows, torch.arange(k).expand(batch, k))
    return into.scatter(1, selection.mix.source, selection.mix.target)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Returns rows ``index`` ``[B, K]`` of ``[B, N, C]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
