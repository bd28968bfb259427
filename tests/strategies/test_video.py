"""Video strategies on a clip whose even places hardly move and whose odd ones do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from tests.families.oracles import inputs_of, model_of
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.registry import build
from vtprune.scoring.temporal import (
    best_of_frames,
    curvature,
    framed,
    rounded,
    steady_channels,
    uniqueness,
)
from vtprune.strategies.dycoke import DyCoke
from vtprune.strategies.evs import EVS
from vtprune.strategies.vcast import VCast
from vtprune.strategies.vidcom2 import SHARPNESS, VidCom2
from vtprune.types import Budget, Signals

T, N, C = 6, 6, 8
NAMES = ("dycoke", "evs", "vcast", "vidcom2")


def moving() -> Tensor:
    """``[T, N, C]``: sines of the place, to which odd places add time."""
    t, n, c = torch.meshgrid(torch.arange(T), torch.arange(N), torch.arange(C), indexing="ij")
    rate = torch.where(n % 2 == 0, 0.02, 0.9)
    return torch.sin(0.21 * (c + 1) * (n + 1) + rate * t * (c + 1))


@pytest.fixture
def clip() -> Signals:
    return Signals(moving().flatten(0, 1)[None], (T, 2, 3))


def kept(strategy, signals, share) -> list[int]:
    return vtprune.select(strategy, keep=share, signals=signals).rows[0].tolist()


def in_frames(*frames: list[int]) -> list[int]:
    return [t * N + i for t, own in enumerate(frames) for i in own]


def test_evs(clip):
    odd = [7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35]
    assert set(kept("evs", clip, 0.5)) <= {*range(6), *odd}
    wanted = [0, 1, 2, 3, 4, 5, 7, 9, 11, 15, 17, 19, 21, 25, 27, 29, 31, 35]
    assert kept("evs", clip, 0.5) == wanted
    changed = EVS().score(clip)[0, N : 2 * N]
    assert changed.tolist() == pytest.approx(
        [0.0007, 0.9254, 0.0031, 0.8697, 0.0039, 0.8271], abs=1e-4
    )
    assert kept("evs", clip, 0.1) == [0, 1, 2, 3]
    assert kept(EVS(compat=True), clip, 0.1) == [0, 1, 2, 3, 4, 5]


def test_vidcom2(clip):
    assert steady_channels(framed(clip))[0].tolist() == [0, 1, 2, 6]
    video, frame = VidCom2().typicalities(clip)
    scores = [5.628, 6.6219, 4.6851, 6.0524, 6.4717, 4.8441]
    assert (video + frame)[0, 0].tolist() == pytest.approx(scores, abs=1e-4)
    shares = uniqueness(video, 0.5, SHARPNESS)[0].tolist()
    assert shares == pytest.approx([0.4167] * 5 + [0.9167], abs=1e-4)
    official = in_frames([2, 5], [2, 3], [2, 3], [2, 3], [1, 5], list(range(6)))
    assert kept(VidCom2(compat=True), clip, 0.5) == official
    assert kept("vidcom2", clip, 0.5) == sorted([*official, 11, 26])


def test_dycoke(clip):
    official = [*range(6), 7, 9, 11, 13, 15, 17, 19, 21, 23, *range(24, 30), 31, 33, 35]
    assert kept(DyCoke(compat=True), clip, (1 + 3 * 0.5) / 4) == official
    assert kept("dycoke", clip, 24) == official  # six frames: no group's third frame stays whole
    assert kept("dycoke", clip, 16) == in_frames([*range(6)], [1], [1], [3], [*range(6)], [1])


def test_dycoke_shares_what_is_left(clip):
    for k in range(1, T * N):
        found = torch.tensor(kept("dycoke", clip, k)) // N
        counts = torch.bincount(found, minlength=T).tolist()
        whole, others = [counts[0], counts[4]], [counts[i] for i in (1, 2, 3, 5)]
        assert sum(counts) == k
        assert max(whole) - min(whole) <= 1
        assert max(others) - min(others) <= 1
        assert sum(others) == 0 or whole == [N, N]


def test_dycoke_officially_gives_few_frames_what_their_number_says():
    tokens = torch.randn(1, 9 * 10, C, generator=torch.Generator().manual_seed(0))
    clip = Signals(tokens, (9, 2, 5))
    counts = {
        dropped: DyCoke(compat=True).budgets(clip, (1 + 3 * (1 - dropped)) / 4)
        for dropped in (0.7, 0.9)
    }
    assert counts[0.7] == [10, 3, 3, 3, 10, 3, 3, 3, 0]  # the last, odd frame is dropped
    assert counts[0.9] == [10, 0, 0, 0, 10, 0, 0, 0, 0]  # (1 - 0.9) * 10 is less than 1
    four = Signals(tokens[:, :40], (4, 2, 5))
    assert DyCoke(compat=True).budgets(four, 0.475) == [10, 3, 10, 3]


def test_vcast(clip):
    turns = [1, 1.4976, 1.6195, 1.4378, 1.091, 1]
    assert curvature(framed(clip))[0].tolist() == pytest.approx(turns, abs=1e-4)
    assert VCast(compat=True).budgets(framed(clip), 18)[0].tolist() == [2, 5, 4, 3, 2, 2]
    assert kept(VCast(compat=True), clip, 0.5) == in_frames(
        [0, 2], [0, 2, 3, 4, 5], [0, 1, 2, 4], [0, 2, 3], [0, 2], [2, 3]
    )
    assert VCast().budgets(framed(clip), 18)[0].tolist() == [2, 4, 4, 3, 3, 2]
    assert kept("vcast", clip, 0.5) == in_frames(
        [0, 2], [0, 2, 3, 5], [0, 1, 2, 4], [0, 2, 3], [0, 2, 5], [2, 3]
    )


def test_vcast_promises_no_more_than_there_is(clip):
    assert VCast(least=4).budgets(framed(clip), 10).sum() == 10
    assert VCast(least=4).budgets(framed(clip), 10).min() >= 1
    sharp = VCast(temperature=1e-3).budgets(framed(clip), 30)  # all is promised to the third frame
    assert sharp[0].tolist() == [5, 5, 6, 5, 5, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"least": -1}, "least=-1"),
        ({"least": True}, "least=True"),
    ],
)
def test_vcast_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        VCast(**options)


@pytest.mark.parametrize("greedy", [False, True])
def test_rounded_sums_within_bounds(greedy):
    draw = torch.Generator().manual_seed(1)
    for most in (3, 5, 40):
        weights = torch.randn(20, 7, generator=draw).mul(2).softmax(-1)
        for k in (1, 6, 20, 21):
            found = rounded(weights * k, k, most, greedy=greedy)
            assert (found.sum(1) == k).all()
            assert ((found >= 0) & (found <= most)).all()
            if most == 40 and not greedy:
                assert (found - weights * k).abs().max() < 1
    exact = torch.tensor([[1.4, 1.8, 1.7, 0.1]])
    assert rounded(exact, 6, 9).tolist() == [[2, 2, 2, 0]]
    assert rounded(exact, 5, 9, greedy=True).tolist() == [[1, 3, 1, 0]]


def test_best_of_frames_mends_budgets_that_miss():
    score = torch.tensor([[[5.0, 1.0, 3.0], [4.0, 2.0, 0.0]]])
    none = torch.zeros(1, 6, dtype=torch.bool)
    for budgets, k, wanted in [
        ([2, 1], 3, [0, 2, 3]),
        ([2, 1], 2, [0, 3]),  # the worst of what frames chose leaves
        ([1, 1], 3, [0, 2, 3]),  # the best of what they left comes back
        ([0, 3], 3, [3, 4, 5]),
    ]:
        assert best_of_frames(score, torch.tensor([budgets]), none, k).tolist() == [wanted]


@pytest.mark.parametrize("name", NAMES)
def test_images_and_single_frames_stay_whole(name):
    strategy = build(name)
    for grid in (None, (1, 6, 6)):
        signals = Signals(moving().flatten(0, 1)[None], grid)
        assert strategy.counts(signals, Budget(fraction=0.25)) == [36]


@pytest.mark.parametrize("name", NAMES)
def test_images_beside_videos_stay_whole(name):
    model, _ = model_of("qwen2_vl")
    with vtprune.wrap(model, name, keep=0.25) as handle:
        model(**inputs_of("qwen2_vl", "video_and_image"))
        images = handle.report().images
    assert [(i.kept, i.tokens) for i in images if i.grid and i.grid[0] == 1] == [(15, 15), (6, 6)]
    assert [(i.kept, i.tokens) for i in images if i.grid and i.grid[0] > 1] == [(9, 36)]


def test_whole_frames_are_asked_for():
    model, _ = model_of("qwen2_vl")
    with pytest.raises(UnsupportedError, match="evs compares whole frames, so it must come first"):
        vtprune.wrap(model, ["random", "evs"], keep=[0.5, 0.5])
    with pytest.raises(UnsupportedError, match="evs needs Frames"):
        vtprune.wrap(model_of("internvl")[0], "evs", keep=0.5)
    vtprune.wrap(model, ["evs", "random"], keep=[0.5, 0.5]).remove()
