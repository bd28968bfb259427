"""HoliTom: segments by what stands still, and what its tokens are made of."""

from __future__ import annotations

import itertools

import pytest
import torch

import vtprune
from tests.families.oracles import inputs_of, model_of
from tests.probes import generate
from tests.strategies.test_video import moving
from vtprune.errors import ConfigError
from vtprune.scoring.still import (
    Pool,
    around_centres,
    loosened,
    most_changed,
    pools_of,
    segments,
    still_places,
    still_runs,
)
from vtprune.scoring.temporal import changes
from vtprune.scoring.videos import running_means
from vtprune.strategies.holitom import HoliTom
from vtprune.types import Budget, Inside, LastRow, Received, Selection, Signals, Spans


def draw(t: int, n: int, seed: int) -> torch.Tensor:
    return torch.rand(t - 1, n, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_the_moving_clip_is_one_segment():
    x = moving()
    spans, redundant = segments(still_runs(changes(x[1:], x[:-1]) < 0.2), 1024)
    assert (spans, redundant) == ([(0, 6)], 15)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [3, 99])
def test_segments_are_the_best_of_all_ways_to_cut(seed, window):
    still = draw(7, 4, seed)

    def redundant(cut: tuple[int, ...]) -> int:
        ends = [0, *cut, 7]
        return sum(
            (end - first - 1) * int(still[first : end - 1].all(0).sum())
            for first, end in itertools.pairwise(ends)
            if end - first > 1
        )

    cuts = [c for r in range(7) for c in itertools.combinations(range(1, 7), r)]
    fitting = [c for c in cuts if all(b - a <= window for a, b in itertools.pairwise([0, *c, 7]))]
    spans, found = segments(still_runs(still), window)
    assert found == max(map(redundant, fitting)) == redundant(tuple(e for _, e in spans[:-1]))
    assert all(end - first <= window for first, end in spans)


@pytest.mark.parametrize("seed", range(4))
def test_pools_hold_every_token_once(seed):
    runs = still_runs(draw(9, 5, seed))
    spans, redundant = segments(runs, 99)
    pools = pools_of(spans, still_places(spans, runs), torch.device("cpu"))
    seen = torch.zeros(9, 5)
    for pool in pools:
        seen[pool.span[0] : pool.span[1], pool.places] += 1
    assert (seen == 1).all()
    assert sum(len(pool.places) for pool in pools) == 45 - redundant


def test_loosened_frees_what_moves_most_and_no_more_than_it_must():
    changed = torch.tensor([[0.0, 0.15, 0.2, 0.9], [0.1, 0.0, 0.3, 0.9]])
    runs = still_runs(changed < 0.5)
    spans, redundant = segments(runs, 99)
    still = still_places(spans, runs)
    assert (spans, redundant, still.tolist()) == ([(0, 3)], 6, [[True, True, True, False]])
    for k, wanted in [(6, [1, 1, 1, 0]), (7, [1, 1, 0, 0]), (8, [1, 1, 0, 0]), (9, [1, 0, 0, 0])]:
        found = loosened(spans, still, most_changed(spans, changed), k)
        assert found.int().tolist() == [wanted], k
    assert not loosened(spans, still, most_changed(spans, changed), 12).any()


def test_a_centre_counts_beta_and_the_others_share_the_rest():
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0]], [[0.0], [3.0], [12.0], [12.0]]])
    made = around_centres(Pool((0, 2), torch.tensor([0, 1, 2, 3])), x, 2, 2, 0.6)
    assert made.rows.tolist() == [0, 2]  # with means of 0, 2 and 11, 11.5
    parts = made.weight[:, None] * x.flatten(0, 1)[made.source]
    out = torch.zeros(2, 1).index_add_(0, made.target, parts)
    assert out.flatten().tolist() == pytest.approx([0.4 * 2, 0.6 * 11 + 0.4 * 11.5])
    alone = around_centres(Pool((0, 2), torch.tensor([1])), x, 1, 7, 0.6)
    assert alone.rows.tolist() == [1]
    assert alone.weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("contextual", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.8, 1.0])
def test_any_count_is_met_and_weights_sum_to_one(tau, contextual):
    clip = Signals(moving().flatten(0, 1)[None], (6, 2, 3))
    clip.values = {Received(0): torch.rand(1, 36, generator=torch.Generator().manual_seed(0))}
    for k in range(1, 36):
        made = vtprune.select(HoliTom(tau=tau, contextual=contextual), keep=k, signals=clip)
        assert made.rows.shape == (1, k)
        assert (made.rows.diff() > 0).all()
        assert torch.allclose(made.apply(torch.ones(1, 36, 1)), torch.ones(1, k, 1))


def one_by_one(tokens: torch.Tensor, kept: list[int], dropped: list[int]) -> torch.Tensor:
    """What is kept after each of the others was averaged with the most similar of it."""
    out = tokens.clone()
    for i in dropped:
        alike = [float(torch.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in kept]
        into = kept[max(range(len(kept)), key=alike.__getitem__)]
        out[into] = (out[into] + tokens[i]) / 2
    return out[kept]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_go_one_by_one_into_what_they_are_most_like(seed):
    tokens = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    places, kept = torch.arange(2, 18), torch.tensor([3, 4, 9, 17])
    made = running_means(places, kept, tokens)
    out = torch.zeros(4, 5).index_add_(0, made.target, made.weight[:, None] * tokens[made.source])
    dropped = [i for i in range(2, 18) if i not in kept.tolist()]
    assert torch.allclose(out, one_by_one(tokens, kept.tolist(), dropped), atol=1e-6)
    assert made.rows.tolist() == kept.tolist()


def inside(seed: int = 0) -> Signals:
    """Three tokens of an image, twelve of a video of 24 and five of one of 40."""
    draw = torch.Generator().manual_seed(seed)
    signals = Signals(torch.randn(1, 20, 5, generator=draw))
    spans = [[0, -1, -1]] * 3 + [[1, 0, 2]] * 12 + [[2, 1, 1]] * 5
    signals.values = {
        Spans(5): torch.tensor([spans]).float(),
        LastRow(4): torch.rand(1, 20, generator=draw),
    }
    signals.inside = Inside(0, (5,), 8, (20,), images=((3, 24, 40),))
    return signals


def test_inside_each_video_keeps_what_the_last_token_looks_at_and_merges_the_rest():
    signals, strategy = inside(), HoliTom(inner=0.5)
    assert strategy.counts(signals, Budget(fraction=0.1)) == [3 + 2 + 4]
    made = vtprune.select(strategy, keep=0.1, signals=signals)
    seen, out = signals.values[LastRow(4)][0], made.apply(signals.tokens)[0]
    for first, end, k in [(3, 15, 2), (15, 20, 4)]:
        kept = sorted(sorted(range(first, end), key=lambda i: -float(seen[i]))[:k])
        at = [made.rows[0].tolist().index(i) for i in kept]
        dropped = [i for i in range(first, end) if i not in kept]
        wanted = one_by_one(signals.tokens[0], kept, dropped)
        assert torch.allclose(out[at], wanted, atol=1e-6)
    assert torch.equal(out[:3], signals.tokens[0, :3])  # the image as it is
    assert made.rows[0, :3].tolist() == [0, 1, 2]


def test_without_inner_everything_happens_before_the_language_model():
    model, _ = model_of("qwen2_5_vl")
    with vtprune.wrap(model, "holitom", keep=0.25) as handle:
        assert not handle.acts_inside


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_inner_comes_down_to_what_was_asked(family):
    model, _ = model_of(family)
    with vtprune.wrap(model, "holitom", keep=0.25, inner=0.5) as handle:
        generate(model, inputs_of(family, "video_and_image"), 2)
        (stage,) = handle.report().stages
        assert handle.steps[1].stage.layer == round(18 / 28 * len(handle.adapter.decoder))
        assert [step.positions for step in handle.steps][1] == "keep"
        items, selections = handle._items, handle.selections
    kept = 0
    for item, made in zip(items, selections, strict=True):
        clip = item.grid is not None and item.grid[0] > 1
        assert made.rows.shape[1] == (round(len(item.free) / 2) if clip else len(item.free)) + len(
            item.fixed
        )
        kept += (round(len(item.free) / 4) if clip else len(item.free)) + len(item.fixed)
    assert (stage.kept, stage.merged) == (kept, True)


def test_the_official_count_inside_is_rounded_too():
    signals = inside()
    assert HoliTom(inner=0.7).counts(signals, Budget(fraction=0.15)) == [3 + 4 + 5]
    made: Selection = vtprune.select(HoliTom(inner=0.7, compat=True), keep=0.15, signals=signals)
    assert made.rows.shape == (1, 3 + round(12 * 0.3) + round(5 * 0.3))


@pytest.mark.parametrize("options", [{"inner": 1.0}, {"inner": True}, {"inner": -0.1}])
def test_refuses_shares_that_leave_nothing(options):
    with pytest.raises(ConfigError, match="inner="):
        HoliTom(**options)


@pytest.mark.parametrize("options", [{"tau": 1.1}, {"beta": -0.1}, {"contextual": 2}, {"near": 0}])
def test_refuses(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        HoliTom(**options)
