"""Frames of a video that are alike, and the runs of neighbours among them.

T frames, N tokens per frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.scoring.clustering import density_peaks
from vtprune.scoring.still import Span


def clustered(features: Tensor, share: float, near: int) -> list[Span]:
    """Cuts a video into runs of frames that belong to one cluster around density peaks.

    Args:
        features: ``[T, D]`` of frames; share: clusters per frame, at least one in all.
        near: by how many neighbours density is told, itself among them.
    """
    frames = len(features)
    clusters = max(1, int(frames * share))
    _, cluster = density_peaks(features[None], clusters, min(near, frames))
    return longest_runs(cluster[0].tolist())


def longest_runs(cluster: Sequence[int]) -> list[Span]:
    """Returns the longest runs of each cluster, widened until they cover all frames.

    A run of one frame is none. Frames of no run go to the longer of those beside them, of equally
    long ones to the earlier. Where there is no run at all every frame is by itself.
    """
    runs, first = [], 0
    for number, members in groupby(cluster):
        length = len(list(members))
        runs.append((number, first, length))
        first += length
    most: dict[int, int] = {}
    for number, _, length in runs:
        most[number] = max(length, most.get(number, 0))
    kept = [(start, n) for number, start, n in runs if n == most[number] > 1]
    if not kept:
        return [(i, i + 1) for i in range(len(cluster))]
    cuts = [0]
    for (start, n), (after, m) in pairwise(kept):
        cuts.append(after if n >= m else start + n)
    return list(zip(cuts, [*cuts[1:], len(cluster)], strict=True))


def steadiness(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Returns how alike the tokens of a place are in a segment, ``[S, N]`` float32.

    That is the mean cosine of two of its frames; -inf in segments of one frame.

    Args:
        x: ``[T, N, D]``.
    """
    units = F.normalize(x.float(), dim=-1)
    own = units.square().sum(-1)
    found = []
    for first, end in spans:
        pairs = units[first:end].sum(0).square().sum(-1) - own[first:end].sum(0)
        n = end - first
        found.append(pairs / (n * (n - 1)) if n > 1 else torch.full_like(pairs, -torch.inf))
    return torch.stack(found)
