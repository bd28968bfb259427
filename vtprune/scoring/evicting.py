"""How much the tokens of a prompt matter to it, head by head, and what becomes of those evicted.

H query heads in groups that share one of Hkv key/value heads, n tokens of one prompt, N of them
visual, d width of a head. Means over a group's heads stand for its key/value head.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.evicting import Entries, Kept
from vtprune.kernels._common import full_precision, widened
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.kernels.topk_sorted import topk_sorted

Merge = Literal["values", "pivot", "average", "weighted", "none"]
AT_ONCE = 256  # queries, so that what each of them sees is never an n x n matrix


def question(visual: Tensor) -> Tensor:
    """Returns the tokens after the last visual one, or the last token alone, ``[M]`` ascending."""
    place = torch.arange(len(visual), device=visual.device)
    after = place[place > place[visual].max()] if bool(visual.any()) else place[:0]
    return after if len(after) else place[-1:]


def window_attention(entries: Entries, rows: Tensor) -> Tensor:
    """Returns the mean attention of the tokens ``rows`` ``[M]`` to each, ``[Hkv, n]`` float32."""
    q, k = _groups(entries)
    return attn_rows(q[:, :, rows], k, scale=entries.scale, seen=entries.seen(rows))


def column_sums(entries: Entries) -> Tensor:
    """Returns the attention that each token receives from all, ``[Hkv, n]`` float32; it sums to n.

    Never with an n x n matrix of probabilities. arXiv 2306.14048 (H2O).
    """
    q, k = _groups(entries)
    if entries.sees is None:
        return attn_received(q, k, scale=entries.scale, causal=True) * entries.n
    every = torch.arange(entries.n, device=q.device)
    return sum(
        (window_attention(entries, rows) * len(rows) for rows in every.split(AT_ONCE)),
        torch.zeros(k.shape[0], entries.n, device=q.device),
    )


def _groups(entries: Entries) -> tuple[Tensor, Tensor]:
    """Returns queries ``[Hkv, H / Hkv, n, d]`` and keys ``[Hkv, 1, n, d]``."""
    return entries.q.unflatten(0, (len(entries.k), -1)), entries.k[:, None]


def pooled(scores: Tensor, where: Tensor | None, side: int, run: int) -> Tensor:
    """Returns the mean of each score and of its neighbours.

    In a grid the neighbours are those in a square of the same image, tile or frame that are there;
    at a border, and where tokens have left, fewer. Tokens made of no patch keep their score.

    Args:
        scores: ``[H, N]``; where: ``[N, 4]`` as in ``Entries``, or None.
        side: of the square, odd; run: tokens in order that count where there is no grid, odd.
    """
    x = scores.float()
    if where is None:
        return F.avg_pool1d(x[:, None], run, 1, run // 2, count_include_pad=False)[:, 0]
    made = (where[:, 0] >= 0).nonzero()[:, 0]
    if not len(made) or side == 1:
        return x
    places = where[made].round().long()
    frames = places[:, :2].unique(dim=0, return_inverse=True)[1]
    at = frames, places[:, 2], places[:, 3]
    shape = [int(axis.max()) + 1 for axis in at]
    grid = x.new_zeros(len(x) + 1, *shape)
    grid[:-1, *at], grid[-1, *at] = x[:, made], 1.0
    sums = F.avg_pool2d(grid.flatten(0, 1)[:, None], side, 1, side // 2).view(grid.shape)
    means = (sums[:-1, *at] / sums[-1, *at]).to(x.dtype)
    return x.index_copy(1, made, means)


def keep_visual(entries: Entries, scores: Tensor, k: int, merge: Merge) -> Kept:
    """Keeps all text and per head the ``k`` visual tokens of highest ``scores`` ``[Hkv, N]``."""
    spots = entries.visual.nonzero()[:, 0]
    stays = (~entries.visual).repeat(len(scores), 1)
    stays.scatter_(1, spots[topk_sorted(scores, k)], True)
    return merged(entries, stays, merge)


def check_merge(merge: str) -> None:
    """Raises ConfigError for an unknown way to merge."""
    if merge not in get_args(Merge):
        known = ", ".join(map(repr, get_args(Merge)))
        raise ConfigError(f"merge={merge!r} is unknown; choose one of {known}.")


def merged(entries: Entries, stays: Tensor, how: Merge) -> Kept:
    """Lets each entry that leaves count in the one that stays and has the most similar key.

    - ``values``: a value v becomes (v + sum w_i v_i) / (1 + sum w_i), w_i the cosine of the keys,
      not below 0, by the share that v_i has in the two norms. Only into visual tokens; keys stay.
    - ``pivot``, ``average``, ``weighted`` (arXiv 2406.18139): keys and values become the mean of
      their own and of what comes to them: of each pair its mean, the evicted one, or that times the
      cosine. Into text too.

    Args:
        stays: ``[Hkv, n]`` bool, equally many in each head.
    """
    goes = stays & entries.visual if how == "values" else stays
    if how == "none" or not bool(goes[0].any()) or bool(stays[0].all()):
        return Kept(stays)
    out, into = (_places(some) for some in (~stays, goes))
    with full_precision(entries.k), torch.no_grad():
        owner, cosine = _closest(entries.k, out, into)
        if how == "values":
            return Kept(stays, v=_weighed(entries.v, out, into, owner, cosine))
        k, v = (_meant(x, out, into, owner, cosine, how) for x in (entries.k, entries.v))
    return Kept(stays, k, v)


def _places(some: Tensor) -> Tensor:
    """Returns where ``some`` ``[H, n]`` bool are, equally many per head: ``[H, m]`` ascending."""
    return some.nonzero()[:, 1].view(len(some), -1)


def _take(x: Tensor, places: Tensor) -> Tensor:
    return widened(x.gather(1, places[..., None].expand(-1, -1, x.shape[2])))


def _closest(keys: Tensor, out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each of ``out`` ``[H, E]`` which of ``into`` is most similar, and the cosine.

    Ties go to the first.
    """
    left, held = (F.normalize(_take(keys, places), dim=-1) for places in (out, into))
    cosine = left @ held.mT
    best = cosine.amax(-1, keepdim=True)
    return (cosine == best).to(torch.uint8).argmax(-1), best[..., 0]


def _weighed(v: Tensor, out: Tensor, into: Tensor, owner: Tensor, cosine: Tensor) -> Tensor:
    leaves, held = _take(v, out), _take(v, into)
    norms, own = leaves.norm(dim=-1), held.norm(dim=-1).gather(1, owner)
    tiny = torch.finfo(norms.dtype).tiny
    weight = cosine.clamp(min=0) * norms / (norms + own).clamp(min=tiny)
    total = 1 + torch.zeros_like(held[..., 0]).scatter_add(1, owner, weight)
    return _put(v, into, _gathered(held, owner, weight[..., None] * leaves) / total[..., None])


def _meant(
    x: Tensor, out: Tensor, into: Tensor, owner: Tensor, cosine: Tensor, how: Merge
) -> Tensor:
    leaves, held = _take(x, out), _take(x, into)
    if how == "pivot":
        leaves = (leaves + _take(held, owner)) / 2
    elif how == "weighted":
        leaves = leaves * cosine[..., None]
    count = 1 + torch.zeros_like(held[..., 0]).scatter_add(1, owner, torch.ones_like(cosine))
    return _put(x, into, _gathered(held, owner, leaves) / count[..., None])


def _gathered(held: Tensor, owner: Tensor, leaves: Tensor) -> Tensor:
    """Returns ``held`` ``[H, K, d]`` with ``leaves`` ``[H, E, d]`` added to their owners."""
    return held.scatter_add(1, owner[..., None].expand_as(leaves), leaves)


def _put(x: Tensor, into: Tensor, made: Tensor) -> Tensor:
    return x.scatter(1, into[..., None].expand_as(made), made.to(x.dtype))
