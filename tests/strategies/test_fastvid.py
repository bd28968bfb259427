"""FastVID: segments, counts, and what anchors are made of."""

from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.strategies.fastvid import FastVID
from vtprune.types import ClsRow, Signals

T, N, C = 8, 12, 6


def clip(seed: int = 0) -> Signals:
    draw = torch.Generator().manual_seed(seed)
    signals = Signals(torch.randn(2, T * N, C, generator=draw), (T, 3, 4))
    signals.values = {ClsRow(0): torch.rand(2, T * N, generator=draw)}
    return signals


def test_a_video_is_cut_where_frames_are_least_alike():
    angles = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.2, 2.9, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert FastVID(segments=1, tau=0.5).spans(features) == [(0, 5), (5, 7)]
    assert FastVID(segments=3, tau=0.5).spans(features) == [(0, 2), (2, 5), (5, 7)]
    assert FastVID(segments=2, tau=0.9).spans(features) == [(0, 2), (2, 5), (5, 7)]
    assert len(FastVID(segments=99).spans(features)) == 7
    assert FastVID().spans(features[:1]) == [(0, 1)]


@pytest.mark.parametrize(
    ("frames", "anchors"),
    [(1, [7]), (2, [0, 14]), (4, [0, 0, 0, 28]), (5, [17, 0, 0, 0, 17]), (8, [0, 0, 0, 28] * 2)],
)
def test_the_official_counts(frames, anchors):
    found = FastVID()._official([(0, frames)], 196, 0.1)
    assert found == ([12] * frames, anchors)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("context", [0.0, 0.4, 1.0])
def test_any_count_is_met_within_frames(context, every):
    strategy = FastVID(segments=3, tau=-1.0, context=context, every=every)
    for k in range(1, T * N, 5):
        made = vtprune.select(strategy, keep=k, signals=clip())
        assert made.rows.shape == (2, k)
        assert (made.rows.diff() > 0).all()
        assert torch.allclose(made.apply(torch.ones(2, T * N, 1)), torch.ones(2, k, 1))


def test_no_room_for_anchors_makes_salient_tokens():
    salient, anchors = FastVID()._exact([(0, 4)], 10, 36)
    assert sum(salient) + sum(anchors) == 36
    assert anchors[:3] == [0, 0, 0]
    assert salient[3] + anchors[3] == 10
    assert max(salient) <= 10


def test_anchors_take_from_their_whole_segment_and_salient_tokens_stay():
    signals, strategy = clip(1), FastVID(segments=1, tau=-1.0)  # one segment, anchors in 3 and 7
    made = vtprune.select(strategy, keep=40, signals=signals)
    assert made.mix is not None
    edges = zip(made.mix.source[0].tolist(), made.mix.target[0].tolist(), strict=True)
    sources: dict[int, set[int]] = {}
    for source, target in edges:
        sources.setdefault(int(made.rows[0, target]), set()).add(source)
    merged = {row: own for row, own in sources.items() if len(own) > 1}
    assert {row // N for row in merged} == {3, 7}
    assert {source // N for own in merged.values() for source in own} == set(range(T))
    kept = [row for row, own in sources.items() if own == {row}]
    assert not any(set(kept) & own for own in merged.values())
    out = made.apply(signals.tokens)
    whole = [i for i, row in enumerate(made.rows[0].tolist()) if row in kept]
    assert torch.equal(out[0, whole], signals.tokens[0, made.rows[0, whole]])


def test_a_broken_token_spoils_no_anchor():
    signals = clip(2)
    signals.tokens[0, 5] = float("nan")
    made = vtprune.select(FastVID(segments=1, tau=-1.0), keep=24, signals=signals)
    assert 5 not in made.rows[0]
    assert made.apply(signals.tokens).isfinite().all()


@pytest.mark.parametrize(
    "options", [{"segments": 0}, {"every": True}, {"tau": 2}, {"context": -1}, {"beta": 1.5}]
)
def test_refuses(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        FastVID(**options)
