"""Clusters around density peaks, and dropped tokens recycled as the means of them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import ranked, topk_sorted
from vtprune.scoring.diversity import outside
from vtprune.selection import Mix, Selection


@torch.no_grad()
def density_peaks(x: Tensor, n: int, near: int | None = None) -> tuple[Tensor, Tensor]:
    """Puts tokens into ``n`` clusters, around those that are dense and far from denser ones.

    A token's density falls with its mean squared distance to its ``near`` nearest (``n`` of them
    where it is not given), itself among them; of equally dense ones the lower index counts as
    denser. Tokens with NaN or inf are the least.

    Args:
        x: ``[B, M, D]``; n: from 1 to M; near: from 1 to M.

    Returns:
        The centres ``[B, n]`` int64, by falling density times distance to the nearest denser token,
        and the cluster of each token ``[B, M]`` int64, in that order, that of the nearest centre.
    """
    points, broken = x.float(), ~x.isfinite().all(-1)
    points = points.masked_fill(broken[..., None], 0.0)
    # Through a matrix product two mutual neighbours would differ by rounding, and both be centres.
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart / x.shape[2] ** 0.5
    density = (-apart.topk(near or n, largest=False).values.square().mean(-1)).exp()
    density = density.masked_fill(broken, -1.0)
    order = torch.arange(x.shape[1], device=x.device)
    denser = density[:, None] > density[:, :, None]  # [B, M, M], the second than the first
    denser |= (density[:, None] == density[:, :, None]) & (order < order[:, None])
    far = apart.flatten(1).amax(1)[:, None]
    lonely = apart.masked_fill(~denser, torch.inf).amin(-1).minimum(far)
    centres = ranked(density * lonely)[:, :n]
    reach = apart.gather(1, centres[..., None].expand(-1, -1, x.shape[1]))  # [B, n, M]
    cluster = (reach == reach.amin(1, keepdim=True)).to(torch.uint8).argmax(1)
    return centres, cluster.scatter(1, centres, order[:n].expand_as(centres))


def n_recycled(n_dropped: int) -> tuple[int, int]:
    """Returns how many of the dropped tokens are recycled, and into how many."""
    pool = 3 * n_dropped // 10 + 1
    return pool, pool // 10 + 1


def n_kept(n: int, k: int) -> int:
    """Returns how many of ``n`` tokens are kept, if ``k`` < n are left with those recycled."""
    fitting = (kept for kept in range(k, 0, -1) if kept + n_recycled(n - kept)[1] <= k)
    return next(fitting, min(1, k))


def recycle(score: Tensor, tokens: Tensor, k: int) -> Selection:
    """Keeps the highest scores, and means of the best of the others.

    Args:
        score: ``[B, N]``; tokens: ``[B, N, D]``; k: how many outputs, from 1 to N - 1.

    Returns:
        The selection of kept tokens, ascending, then one for each cluster of the others.
    """
    n, first = score.shape[1], n_kept(score.shape[1], k)
    kept = topk_sorted(score, first)  # [B, first]
    if first == k:
        return Selection(kept, n)
    rest = outside(kept, n)
    best = topk_sorted(score.gather(1, rest), n_recycled(n - first)[0])
    pool = rest.gather(1, best)  # [B, P]
    (points,) = gather_tokens(pool, tokens)
    centres, cluster = density_peaks(points, k - first)
    size = torch.zeros(centres.shape, device=score.device)
    size.scatter_add_(1, cluster, torch.ones(pool.shape, device=score.device))
    ones = torch.ones(kept.shape, device=score.device)
    itself = torch.arange(first, device=score.device).expand_as(kept)
    mix = Mix(
        torch.cat([kept, pool], dim=1),
        torch.cat([itself, first + cluster], dim=1),
        torch.cat([ones, (1 / size).gather(1, cluster)], dim=1),
    )
    return Selection(torch.cat([kept, pool.gather(1, centres)], dim=1), n, mix)
