"""The streaming pruner: what it keeps, remembers and refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vtprune
from vtprune.errors import ConfigError, InputError
from vtprune.scoring.streaming import StreamingPruner
from vtprune.types import Signals

T, N, D = 5, 12, 8


def video(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, N, D, generator=torch.Generator().manual_seed(seed))


def by_hand(frames: torch.Tensor) -> torch.Tensor:
    """The scores of the last frame, low = kept, from all frames at once."""
    last = frames[-1]
    steady = last.var(0, correction=0).argsort(stable=True)[: D // 2].sort().values
    units = F.normalize(last[:, steady], dim=-1)
    memory = F.normalize(frames.mean(1).mean(0)[steady], dim=-1)

    def near(center: torch.Tensor) -> torch.Tensor:
        apart = (units - center).square().sum(-1)
        widths = [2.0**power for power in range(-3, 2)]
        return torch.stack([torch.exp(-apart / (2 * width)) for width in widths]).sum(0)

    return near(units.mean(0)) + near(memory)


def test_each_frame_is_decided_by_itself_and_all_before():
    frames, pruner = video(), StreamingPruner(4)
    for t in range(T):
        wanted = by_hand(frames[: t + 1]).argsort(stable=True)[:4].sort().values
        assert torch.equal(pruner.update(frames[t]), wanted)
    pruner.reset()
    assert torch.equal(pruner.update(frames[3]), by_hand(frames[3:4]).argsort()[:4].sort().values)


def test_the_memory_matters():
    frames = video(1)
    differ = [
        not torch.equal(
            by_hand(frames[: t + 1]).argsort()[:6], by_hand(frames[t : t + 1]).argsort()[:6]
        )
        for t in range(1, T)
    ]
    assert any(differ)


def test_the_strategy_is_the_stream():
    frames = video(2)
    signals = Signals(frames.flatten(0, 1)[None], (T, 3, 4))
    for k, counts in [(20, [4] * T), (23, [5, 5, 5, 4, 4]), (3, [1, 1, 1, 0, 0])]:
        rows = vtprune.select("stc", keep=k, signals=signals).rows[0]
        pruner = StreamingPruner()
        kept = [
            t * N + pruner.update(frame, n)
            for t, (frame, n) in enumerate(zip(frames, counts, strict=True))
        ]
        assert torch.equal(rows, torch.cat(kept))


def test_a_frame_with_fewer_tokens_stays_whole_and_broken_ones_come_last():
    pruner = StreamingPruner(4)
    assert pruner.update(video()[0, :3]).tolist() == [0, 1, 2]
    broken = video()[1].clone()
    broken[[0, 5]] = float("nan")
    pruner.update(broken)
    after = pruner.update(video()[2].half(), 10)
    assert after.shape == (10,)
    assert not {0, 5} & set(StreamingPruner(10).update(broken).tolist())


@pytest.mark.parametrize("keep", [0, -1, True, 2.0])
def test_refuses_other_counts(keep):
    with pytest.raises(ConfigError, match="keep="):
        StreamingPruner(keep)


def test_refuses_other_frames():
    pruner = StreamingPruner(2)
    with pytest.raises(ConfigError, match="keep is missing"):
        StreamingPruner().update(video()[0])
    with pytest.raises(InputError, match=r"give a float tensor \[N, D\]"):
        pruner.update(video())
    pruner.update(video()[0])
    with pytest.raises(InputError, match=r"\[N, 8\] as before, or reset"):
        pruner.update(video()[0, :, :4])
