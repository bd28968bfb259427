"""Caches that some entries left, by definition: whole matrices of attention, loops, no cache.

Rows of the prompt attend as ever. Rows behind it see, head by head, what stays of the prompt, with
the keys and values that merging makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune.strategies.lookm import LookM
from vtprune.strategies.snapkv import SnapKV
from vtprune.types import Budget

Place = tuple[float, ...]  # image, frame, row, column; image -1 = made of no patch


def smoothed(
    scores: list[float], places: Sequence[Place] | None, side: int, run: int
) -> list[float]:
    """The mean over a square of neighbours, or over neighbours in order."""
    out = []
    for i in range(len(scores)):
        near = list(range(max(0, i - run // 2), min(len(scores), i + run // 2 + 1)))
        if places is not None:
            near = [
                j
                for j, place in enumerate(places)
                if place[:2] == places[i][:2]
                and max(abs(a - b) for a, b in zip(place, places[i], strict=True)) <= side // 2
            ]
        if places is not None and places[i][0] < 0:
            near = [i]
        out.append(sum(scores[j] for j in near) / len(near))
    return out


def best(scores: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


@dataclass
class ByDefinition:
    """What a strategy leaves in the cache of one prompt."""

    strategy: Any
    budget: Budget

    def chosen(self, p: Tensor, visual: list[int], places: Sequence[Place] | None) -> list[int]:
        """Visual tokens that a head keeps, by the attention ``[G, n, n]`` of its queries."""
        n, strategy = p.shape[-1], self.strategy
        if isinstance(strategy, SnapKV):
            rows = [i for i in range(n) if i > visual[-1]] or [n - 1]
            if strategy.window is not None:
                rows = list(range(n))[-strategy.window :]
            mass = [float(p[:, rows, j].mean()) for j in visual]
            scores = smoothed(mass, places, strategy.side, strategy.run)
            return [visual[i] for i in best(scores, self.budget.count(len(visual)))]
        assert isinstance(strategy, LookM)
        recent = int(strategy.recent * n)
        late = [j for j in visual if j >= n - recent]
        k = self.budget.count(len(visual))
        if strategy.compat:
            text = sum(j not in visual for j in range(n - recent))
            hitters = int((self.budget.share(n) - strategy.recent) * n)
            k = min(len(visual), len(late) + max(0, hitters - text))
        early = [j for j in visual if j not in late]
        sums = [float(p[:, :, j].sum() / len(p)) for j in early]
        late = late[max(0, len(late) - k) :]
        return [*late, *(early[i] for i in best(sums, k - len(late)))]

    def merge(
        self, k: Tensor, v: Tensor, stays: list[int], visual: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, d]`` of a head, with what leaves in what stays."""
        how = getattr(self.strategy, "merging", self.strategy.merge)
        into = [j for j in stays if how != "values" or j in visual]
        if how == "none" or not into:
            return k, v
        new_k, new_v, coming = k.clone(), v.clone(), dict[int, list[tuple[int, float]]]()
        for i in (i for i in range(len(k)) if i not in stays):
            likeness = torch.cosine_similarity(k[i, None], k[into], dim=1).tolist()
            j = best(likeness, 1)[0]
            coming.setdefault(into[j], []).append((i, likeness[j]))
        for j, those in coming.items():
            if how == "values":
                weights = [
                    max(0.0, c) * float(v[i].norm() / (v[i].norm() + v[j].norm())) for i, c in those
                ]
                total = v[j] + sum(w * v[i] for w, (i, _) in zip(weights, those, strict=True))
                new_v[j] = total / (1 + sum(weights))
                continue
            for x, new in ((k, new_k), (v, new_v)):
                added = {
                    "pivot": [(x[i] + x[j]) / 2 for i, _ in those],
                    "average": [x[i] for i, _ in those],
                    "weighted": [c * x[i] for i, c in those],
                }[how]
                new[j] = torch.stack([x[j], *added]).mean(0)
        return new_k, new_v

    def left(
        self, p: Tensor, k: Tensor, v: Tensor, visual: list[int], places: Sequence[Place] | None
    ) -> tuple[list[int], Tensor, Tensor]:
        """What leaves of a prompt's ``n`` tokens in a head, its keys and values from then on."""
        keeps = self.chosen(p, visual, places)
        stays = [i for i in range(len(k)) if i not in visual or i in keeps]
        return [i for i in range(len(k)) if i not in stays], *self.merge(k, v, stays, visual)


@contextmanager
def evicted(
    layers: Sequence[Any],
    numbers: Sequence[int],
    definition: ByDefinition,
    visual: Tensor,
    places: Tensor | None,
) -> Iterator[None]:
    """Lets eager attention of these layers leave out what is evicted, for rows behind the prompt.

    Args:
        visual: ``[B, n]`` bool over the prompt; places: ``[B, n, 4]``, None = no grids.
    """
    mine, n = {layers[number].self_attn for number in numbers}, visual.shape[1]
    known: dict[Any, tuple[Tensor, list[int], Tensor, Tensor]] = {}  # once per prompt and head

    def of_head(b: int, p: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        there = (mask[b if len(mask) > 1 else 0, 0, n] >= 0)[:n].nonzero()[:, 0]
        seen = [i for i, j in enumerate(there.tolist()) if visual[b, j]]
        where = None
        if places is not None:
            where = [tuple(places[b, there[i]].tolist()) for i in seen]
        if not seen:
            return there, [], k[there], v[there]
        return there, *definition.left(p[:, there][:, :, there], k[there], v[there], seen, where)

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        groups, mask = q.shape[1] // k.shape[1], q.new_zeros(1, 1, 1, 1)
        mask = mask if attention_mask is None else attention_mask[..., : k.shape[2]]

        def rows(keys: Tensor, values: Tensor, hidden: Tensor | float = 0.0) -> Any:
            keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
            p = (q @ keys.mT * scaling + mask + hidden).softmax(-1)
            return p, p @ values

        p, out = rows(k, v)
        if module in mine and q.shape[2] > n:
            new_k, new_v = k.clone(), v.clone()
            hidden = torch.zeros(*p.shape[:2], 1, p.shape[3])
            for b in range(len(q)):
                for head in range(k.shape[1]):
                    heads = slice(head * groups, (head + 1) * groups)
                    if (module, b, head) not in known:
                        own = p[b, heads], k[b, head], v[b, head]
                        known[module, b, head] = of_head(b, *own, mask)
                    there, leaves, *made = known[module, b, head]
                    hidden[b, heads, :, there[leaves]] = -1e30
                    new_k[b, head, there], new_v[b, head, there] = made
            out = torch.cat([out[:, :, :n], rows(new_k, new_v, hidden)[1][:, :, n:]], dim=2)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["eager"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
