"""PruneVid: segments, what is merged before the language model, and what stays inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtprune
from tests.families import batches
from tests.families.oracles import inputs_of, model_of
from tests.families.prompts import image, user, video
from tests.strategies.test_video import moving
from vtprune.engine.plan import find_adapter
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.scoring.runs import clustered, longest_runs, steadiness
from vtprune.scoring.still import Pool, around_centres
from vtprune.scoring.videos import videos
from vtprune.strategies.prunevid import PruneVid
from vtprune.types import Budget, Inside, Selection, Signals, Spans, TextPeak


@pytest.mark.parametrize(
    ("cluster", "spans"),
    [
        ([0, 0, 0, 0], [(0, 4)]),
        ([0, 0, 1, 1, 1, 0], [(0, 2), (2, 6)]),  # the single 0 at the end has one neighbour
        ([0, 0, 2, 1, 1, 1], [(0, 2), (2, 6)]),  # one frame goes to the longer run
        ([0, 0, 2, 1, 1], [(0, 3), (3, 5)]),  # of equally long ones to the earlier
        ([2, 0, 0, 1, 1], [(0, 3), (3, 5)]),
        ([0, 0, 0, 1, 0, 0, 1, 1], [(0, 6), (6, 8)]),  # only the longest run of a cluster is one
        ([0, 0, 1, 1, 0, 0], [(0, 2), (2, 4), (4, 6)]),  # both of two
        ([0, 1, 0, 1], [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_runs_of_clusters(cluster, spans):
    assert longest_runs(cluster) == spans


def test_frames_that_are_alike_are_one_segment():
    angles = torch.tensor([0.0, 0.01, 0.02, 0.01, 1.5, 1.51, 1.5, 1.49])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert clustered(features, 0.25, 7) == [(0, 4), (4, 8)]
    assert clustered(features[:3], 0.25, 7) == [(0, 3)]  # fewer than four have one cluster


def test_steadiness_is_the_mean_cosine_of_pairs():
    x = moving()
    for first, end in [(0, 2), (1, 5), (0, 6)]:
        pairs = [(i, j) for i in range(first, end) for j in range(first, end) if i != j]
        cosines = [F.cosine_similarity(x[i], x[j], dim=-1) for i, j in pairs]
        wanted = torch.stack(cosines).mean(0)
        assert torch.allclose(steadiness(x, [(first, end)])[0], wanted, atol=1e-5)
    assert steadiness(x, [(3, 4)]).isneginf().all()


def clip() -> Signals:
    return Signals(moving().flatten(0, 1)[None], (6, 2, 3))


def weights(made: Selection) -> Tensor:
    return made.apply(torch.eye(made.n)[None])[0]


@pytest.mark.parametrize("tau", [-1.0, 0.8, 1.0])
def test_any_count_is_met_and_every_token_is_in_one_mean(tau):
    for k in range(1, 36, 3):
        made = vtprune.select(PruneVid(tau=tau), keep=k, signals=clip())
        assert made.rows.shape == (1, k)
        assert (made.rows.diff() > 0).all()
        means = weights(made)
        assert torch.allclose(means.sum(1), torch.ones(k))
        assert ((means > 0).sum(0) <= 1).all()
        for row in means:
            assert torch.allclose(row[row > 0], row.max())  # plain means


def test_static_places_are_means_over_their_segment_and_stand_in_its_first_frame():
    made = vtprune.select(PruneVid(tau=0.9), keep=21, signals=clip())
    spans = [(row > 0).nonzero()[:, 0] for row in weights(made)]
    assert [rows.tolist() for rows in spans[:2]] == [[0, 6, 12, 18, 24, 30], [1]]
    assert made.rows[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    still = {int(rows[0]) for rows in spans if len(rows) > 1}
    assert still == {0, 2, 4}  # the even places hardly move


def test_a_cluster_is_the_plain_mean_of_what_is_nearest_its_centre():
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0], [12.0]]])
    made = around_centres(Pool((0, 1), torch.arange(5)), x, 2, 5, None)
    rows = [made.weight[made.target == i].tolist() for i in range(2)]
    assert sorted(map(len, rows)) == [2, 3]
    assert all(row == pytest.approx([1 / len(row)] * len(row)) for row in rows)


def test_officially_halves_what_is_more_than_fourteen():
    x = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x[:, :, :20], x[:, :1, 20:].expand(-1, 4, -1, -1)], 2)  # ten places stand still
    signals = Signals(x.flatten(1, 2), (4, 5, 6))
    strategy = PruneVid(compat=True)
    assert strategy.counts(signals, Budget(fraction=0.99)) == [10 + 4 * 10]
    made = vtprune.select(strategy, keep=0.99, signals=signals)
    assert made.rows[0, :10].tolist() == list(range(20, 30))  # static ones first
    assert strategy.counts(signals, Budget(tokens=30)) == [30]
    assert vtprune.select(strategy, keep=30, signals=signals).rows.shape == (1, 30)


# -- inside the language model ---------------------------------------------------------------------


def inside(counts: tuple[int, ...], spans: Sequence[Sequence[float]], peaks: Tensor) -> Signals:
    """One sample whose items had ``counts`` tokens, of which those with ``spans`` are left."""
    n = len(spans)
    signals = Signals(torch.randn(1, n, 4, generator=torch.Generator().manual_seed(1)))
    signals.values = {Spans(5): torch.tensor([spans]), TextPeak(4): peaks[None]}
    signals.inside = Inside(0, (5,), 8, (n,), images=(counts,))
    return signals


SPANS: list[list[int]] = (
    [[0, -1, -1]] * 3 + [[1, 0, 2]] * 4 + [[1, 0, 0]] * 2 + [[1, 1, 1]] * 6 + [[2, 0, 0]] * 5
)
PEAKS = torch.tensor([0, 0, 0, 4, 1, 3, 2, 9, 8, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1]).float()


def test_each_pool_keeps_its_share_of_what_the_question_looks_at():
    signals = inside((3, 30, 20), SPANS, PEAKS)
    assert PruneVid().counts(signals, Budget(fraction=0.2)) == [3 + 6 + 4]
    made = vtprune.select(PruneVid(), keep=0.2, signals=signals)
    # The image is whole; of the 12 tokens of the first video in pools of 4, 2 and 6 half stay.
    assert made.rows[0].tolist() == [0, 1, 2, 3, 5, 7, 12, 13, 14, 15, 16, 17, 18]
    assert made.mix is None
    found, others = videos(signals, 0)
    assert [(v.whole, v.sizes) for v in found] == [(30, [2, 4, 6]), (20, [5])]
    assert others.tolist() == [0, 1, 2]


def test_each_video_has_its_own_count():
    signals = inside((3, 30, 20), SPANS, PEAKS)
    made = vtprune.select(PruneVid(), keep=2, signals=signals)
    assert made.rows[0, :3].tolist() == [0, 1, 2]
    kept = made.rows[0, 3:]
    assert ((kept < 15).sum(), (kept >= 15).sum()) == (2, 2)


def test_officially_a_pool_keeps_two_fifths_rounded_down():
    signals = inside((3, 30, 20), SPANS, PEAKS)
    made = vtprune.select(PruneVid(compat=True), keep=0.9, signals=signals)
    assert made.rows[0].tolist() == [0, 1, 2, 3, 13, 14, 15, 16]  # 1 of 4, 0 of 2, 2 of 6, 2 of 5
    less = vtprune.select(PruneVid(compat=True), keep=1, signals=signals)
    assert less.rows.shape == (1, 5)


@pytest.mark.parametrize("compat", [False, True])
def test_the_count_is_met_where_some_tokens_may_not_be_chosen(compat):
    some = [1, 2, 4, 5, 6, 9, 10, 11, 15, 16]  # of sinks none is shown
    signals = inside((3, 30, 20), [SPANS[i] for i in some], PEAKS[some])
    signals.budget = Budget(tokens=3)
    made = PruneVid(compat=compat).select(signals, 3 + 3 + 3)
    assert made.rows.shape == (1, 9)
    assert made.rows[0, :2].tolist() == [0, 1]


@dataclass(frozen=True)
class Noting(PruneVid):
    seen: list[Signals] = field(default_factory=list, hash=False, compare=False)

    def select(self, signals: Signals, k: int) -> Selection:
        self.seen.append(signals)
        return super().select(signals, k)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_both_stages_leave_what_they_should_of_every_video(family):
    model, processor = model_of(family)
    prompts = [
        user(video(1, 56, 40), "What happens?"),
        user(image(2, 48, 66), "and", video(3, 40, 64), "or", video(4, 56, 40), "What is seen?"),
    ]
    strategy = Noting(tau=0.0)
    with vtprune.wrap(model, strategy, keep=0.2) as handle:
        model(**batches.of(processor, *prompts))
        report, mrope = handle.report(), handle.adapter.facts.mrope
    assert [step.positions for step in handle.steps] == ["keep" if mrope else "renumber", "keep"]
    kept, spans = [0, 0], [list[list[float]](), list[list[float]]()]
    for seen, item, made in zip(report.images, handle._items, handle.selections, strict=True):
        if item.grid is None or item.grid[0] == 1:
            kept[seen.sample] += len(item)
            assert made.is_identity
            continue
        n = len(item.free)
        kept[seen.sample] += round(n * 0.2) + len(item.fixed)
        assert made.rows.shape[1] == round(n * 0.5) + len(item.fixed)
        frame = torch.arange(n) // (n // item.grid[0])
        for row in weights(made)[:, item.free]:
            if row.any():
                spans[seen.sample].append([int(frame[row > 0].min()), int(frame[row > 0].max())])
    left = {stage.sample: stage.kept for stage in report.stages}
    assert [left[0], left[1]] == kept
    read = [(s, s.item) for s in strategy.seen if s.inside is not None and s.item is not None]
    found = {int(item[i]): s.stack(Spans)[-1][i] for s, item in read for i in range(len(s.tokens))}
    for sample, wanted in enumerate(spans):
        own = found[sample][found[sample][:, 1] >= 0]
        assert sorted(own[:, 1:].tolist()) == sorted(wanted)
        assert own[:, 0].unique().tolist() == ([0.0] if not sample else [1.0, 2.0])
    assert any(first < last for first, last in spans[1])


def test_a_share_of_one_stays_before_the_language_model():
    model, _ = model_of("qwen2_5_vl")
    with vtprune.wrap(model, "prunevid", keep=0.25, alpha=1.0) as handle:
        assert not handle.acts_inside
        model(**inputs_of("qwen2_5_vl", "video_and_image"))
        (clip,) = [i for i in handle.report().images if i.grid and i.grid[0] > 1]
    assert clip.kept == round(clip.tokens * 0.25)


def test_a_model_without_layers_to_act_before_is_refused():
    shallow = replace(find_adapter(model_of("qwen2_5_vl")[0]).facts, decoder_layers=1)
    with pytest.raises(UnsupportedError, match="no layer of its language model"):
        PruneVid().plan(shallow)


@pytest.mark.parametrize(
    "options",
    [{"tau": 2}, {"segments": 0}, {"alpha": 1.2}, {"alpha": True}, {"cluster": -1}, {"near": 0}],
)
def test_refuses(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        PruneVid(**options)
