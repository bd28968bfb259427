"""What a cache holds by definition: whole matrices, in which what dropped is hidden from those that
come later, and what is packed is rounded for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.types import RowRule


def rounded(x: Tensor, bits: int) -> Tensor:
    """``x`` ``[..., d]`` in steps of its own per 32 neighbours."""
    parts = []
    for group in x.split(32, dim=-1):
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        level = torch.where(step > 0, (group - low) / step, 0.0).round()
        parts.append(low + level * step)
    return torch.cat(parts, dim=-1)


def needed(mass: Sequence[float], share: float) -> list[int]:
    """The fewest that hold the share of all, the largest first; and the last."""
    held, best, wanted = 0.0, set[int](), share * sum(mass)
    for i in sorted(range(len(mass)), key=lambda i: -mass[i]):
        if held >= wanted:
            break
        held, best = held + mass[i], best | {i}
    return sorted(best | {len(mass) - 1})


def settle(
    rule: RowRule, k: Tensor, v: Tensor, seen: Tensor, stays: Tensor, valid: Tensor, at: range
) -> None:
    """Writes what becomes of the columns ``at`` for who comes after them."""
    for b in range(len(valid)):
        columns = [c for c in at if valid[b, c]]
        chosen = [c for c in columns if stays[b, c]]
        others = [c for c in columns if not stays[b, c]]
        if rule.others == "drop":
            seen[b, at.stop :, others] = False
        if rule.others == "pack":
            for some, bits in zip((chosen, others), rule.bits, strict=True):
                if some:
                    k[b, :, some] = rounded(k[b, :, some].mT, bits).mT
                    v[b, :, some] = rounded(v[b, :, some], bits)


def through_cache(
    rule: RowRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    stays: Tensor,
    valid: Tensor,
    prompt: int,
) -> Tensor:
    """What attention gives ``[B, H, L, d]`` from scaled ``q``, ``k`` and ``v`` of all heads.

    Of the first ``prompt`` columns only those that ``stays`` ``[B, L]`` attend and are seen there.
    """
    assert rule.chooser is not None
    n, out = seen.shape[1], torch.zeros_like(q)
    k, v, seen, stays = k.clone(), v.clone(), seen.clone(), stays.clone()
    alone = torch.eye(n, dtype=torch.bool)
    among = seen & stays[:, None] | alone
    made = (q @ k.mT).masked_fill(~among[:, None], -1e30).softmax(-1) @ v
    out[:, :, :prompt] = made.masked_fill(~stays[:, None, :, None], 0.0)[:, :, :prompt]
    settle(rule, k, v, seen, stays, valid, range(prompt))
    every = rule.every or n
    for first in range(prompt, n, every):
        rows = range(first, min(first + every, n))
        scores = q[:, :, rows.start : rows.stop] @ k.mT
        hidden = ~seen[:, None, rows.start : rows.stop]
        whole = scores.masked_fill(hidden, -1e30).softmax(-1)
        out[:, :, rows.start : rows.stop] = whole @ v
        if len(rows) == every and rule.others != "keep":
            for b, last in enumerate(whole[:, :, -1].mean(1)):
                best = needed(last[rows.start : rows.stop].tolist(), rule.chooser.share)
                stays[b, rows.start : rows.stop] = False
                stays[b, [first + i for i in best]] = True
            settle(rule, k, v, seen, stays, valid, rows)
    return out
