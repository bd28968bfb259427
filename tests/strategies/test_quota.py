"""QuoTA: scores of frames, budgets by them, and frames made smaller."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtprune
from tests.families.oracles import inputs_of, model_of
from tests.families.prompts import image
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.scoring.asking import STEPS, Judge, asked, objects_in
from vtprune.scoring.shrinking import SHRINKING, rectangle
from vtprune.scoring.still import Made
from vtprune.scoring.temporal import capped
from vtprune.strategies.quota import Quota
from vtprune.types import Budget, Signals

T, H, W, C = 4, 4, 6, 8
N = H * W


def clip() -> Signals:
    draw = torch.Generator().manual_seed(0)
    signals = Signals(torch.randn(1, T * N, C, generator=draw), (T, H, W))
    signals.text = [torch.randn(3, C, generator=draw)]
    return signals


def by(*scores: float):
    return lambda frames, question: torch.tensor(scores)


def per_frame(rows: Tensor) -> list[int]:
    return torch.bincount(rows // N, minlength=T).tolist()


# -- budgets ---------------------------------------------------------------------------------------


def test_budgets_go_by_the_square_of_scores():
    made = vtprune.select(Quota(by(0.1, 0.2, 0.0, 0.3)), keep=28, signals=clip())
    assert per_frame(made.rows[0]) == [2, 8, 0, 18]  # 1 : 4 : 0 : 9
    made = vtprune.select(Quota(by(0.1, 0.2, 0.0, 0.3), power=1), keep=24, signals=clip())
    assert per_frame(made.rows[0]) == [4, 8, 0, 12]


def test_largest_remainder_is_exact_and_the_official_rounding_is_not():
    scorer = by(1, 1, 1, 0)
    assert per_frame(vtprune.select(Quota(scorer), keep=20, signals=clip()).rows[0]) == [7, 7, 6, 0]
    made = vtprune.select(Quota(scorer, compat=True), keep=20, signals=clip())
    assert per_frame(made.rows[0]) == [6, 6, 6, 0]
    one = vtprune.select(Quota(scorer, compat=True), keep=2, signals=clip())
    assert per_frame(one.rows[0]) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("weights", "k", "wanted"),
    [
        ([1, 1, 2], 8, [2, 2, 4]),
        ([1, 1, 8], 16, [3, 3, 10]),  # what the last cannot take goes to the others
        ([1, 3, 96], 18, [2, 6, 10]),
        ([1, 12, 87], 22, [2, 10, 10]),  # and again
        ([0, 0, 1], 12, [0, 0, 10]),  # there is nobody to take the rest
        ([0, 0, 0], 6, [2, 2, 2]),
    ],
)
def test_a_full_frame_hands_on_in_proportion(weights, k, wanted):
    found = capped(torch.tensor([weights]).float(), k, 10)[0]
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("reducer", ["topk", "linspace", "tome"])
def test_any_count_is_met(reducer):
    for k in (1, 2, 7, 40, 95):
        made = vtprune.select(Quota(by(0, 0, 1, 9), reducer=reducer), keep=k, signals=clip())
        assert made.rows.shape == (1, k)
        assert (made.rows.diff() > 0).all()
        assert torch.allclose(made.apply(torch.ones(1, T * N, 1)), torch.ones(1, k, 1))


@pytest.mark.parametrize("reducer", ["interpolate", "pool"])
def test_pictures_take_at_most_what_was_asked(reducer):
    strategy = Quota(by(1, 2, 0, 3), reducer=reducer)
    for k in (1, 9, 41, 90):
        made = vtprune.select(strategy, keep=k, signals=clip())
        assert made.rows.shape[1] <= k
        assert torch.allclose(made.apply(torch.ones(1, T * N, 1)), torch.tensor(1.0))
    assert vtprune.select(strategy, keep=28, signals=clip()).rows.shape == (1, 2 + 8 + 18)


# -- scores ----------------------------------------------------------------------------------------


def test_the_default_score_is_the_mean_relevance_of_a_frame():
    signals = clip()
    assert signals.text is not None
    cosines = F.cosine_similarity(signals.tokens[0, :, None], signals.text[0][None], dim=-1)
    relevant = cosines.mean(1)
    frames = relevant.view(T, N).mean(1)
    wanted = (frames - frames.min() + 1e-6) / (frames.max() - frames.min())
    assert torch.allclose(Quota().scores(signals)[0], wanted, atol=1e-5)
    made = vtprune.select("quota", keep=30, signals=signals)
    for t, k in enumerate(per_frame(made.rows[0])):
        own = relevant.view(T, N)[t].topk(k).indices + t * N
        assert made.rows[0][made.rows[0] // N == t].tolist() == sorted(own.tolist())


def test_a_scorer_sees_each_video_and_its_question():
    seen = []

    def scorer(frames: Tensor, question: Tensor) -> Tensor:
        seen.append((frames, question))
        return torch.ones(len(frames))

    signals = clip()
    vtprune.select(Quota(scorer), keep=8, signals=signals)
    ((frames, question),) = seen
    assert torch.equal(frames, signals.tokens.view(T, N, C))
    assert signals.text is not None
    assert torch.equal(question, signals.text[0])


def test_several_scores_per_frame_are_averaged():
    signals = clip()
    twice = Quota(by(0, 2, 1, 1, 3, 5, 0, 0)).scores(signals)
    assert twice.tolist() == [[1, 1, 4, 0]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 4 frames"),
        ([[1.0] * 4], r"shape \(1, 4\)"),
        ([1.0, -1.0, 0.0, 0.0], "below 0"),
        ([1.0, float("nan"), 0.0, 0.0], "below 0, or none"),
    ],
)
def test_a_scorer_that_returns_something_else_is_refused(scores, message):
    with pytest.raises(InputError, match=message):
        vtprune.select(Quota(lambda *_: torch.tensor(scores)), keep=8, signals=clip())


@pytest.mark.parametrize("options", [{"power": -1.0}, {"reducer": "crop"}, {"scorer": [0.5, 0.5]}])
def test_refuses(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        Quota(**options)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_a_wrapped_model_drops_frames_without_a_score(family):
    model, processor = model_of(family)
    inputs = inputs_of(family, "video_and_image")
    first = by(0, 0, 1, 0, 0) if family == "llava_onevision" else by(0, 0, 0, 1, 1, 0)
    with vtprune.wrap(model, "quota", keep=0.1, scorer=first, processor=processor) as handle:
        model(**inputs)
        items, selections, report = handle._items, handle.selections, handle.report()
    with pytest.raises(ConfigError, match="pass processor="):
        vtprune.wrap(model, "quota", keep=0.1)
    for item, made, seen in zip(items, selections, report.images, strict=True):
        if item.grid is None or item.grid[0] == 1:
            assert made.is_identity
            continue
        n = len(item.free) // item.grid[0]
        places = torch.searchsorted(item.free, made.rows[0][torch.isin(made.rows[0], item.free)])
        assert len(places) == round(0.1 * len(item.free))
        frames = (places // n).unique().tolist()
        assert frames == ([2] if family == "llava_onevision" else [1, 2])
        assert seen.kept < seen.tokens


# -- frames made smaller ---------------------------------------------------------------------------


def weights(made: Made) -> Tensor:
    out = torch.zeros(len(made.rows), N)
    return out.index_put_((made.target, made.source), made.weight, accumulate=True)


@pytest.mark.parametrize("name", SHRINKING)
def test_a_frame_keeps_its_number_in_distinct_places(name):
    x = clip().tokens[0, :N]
    for n in range(1, N + 1):
        made = SHRINKING[name](x, (H, W), n)
        high, wide = rectangle(n, (H, W))
        assert len(made.rows) == (high * wide if name in ("interpolate", "pool") else n)
        assert len(set(made.rows.tolist())) == len(made.rows)
        assert torch.allclose(weights(made).sum(1), torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(weights(SHRINKING[name](x, (H, W), N)), torch.eye(N), atol=1e-6)


def test_pictures_are_what_torch_makes_of_the_tokens():
    x = clip().tokens[0, :N]
    picture = x.T.view(1, C, H, W)
    for name, small in [
        ("interpolate", F.interpolate(picture, (2, 3), mode="bilinear")),
        ("pool", F.adaptive_avg_pool2d(picture, (2, 3))),
    ]:
        made = SHRINKING[name](x, (H, W), 6)
        assert torch.allclose(weights(made) @ x, small.view(C, 6).T, atol=1e-6)
        assert made.rows.tolist() == [7, 9, 11, 19, 21, 23]


@pytest.mark.parametrize(
    ("n", "grid", "size"),
    [
        (1, (4, 4), (1, 1)),
        (6, (4, 4), (2, 3)),
        (9, (4, 4), (3, 3)),
        (99, (4, 4), (4, 4)),
        (150, (27, 27), (12, 12)),
        (15, (2, 10), (2, 7)),
        (5, (1, 100), (1, 5)),
        (5, (100, 1), (5, 1)),
    ],
)
def test_rectangles(n, grid, size):
    assert rectangle(n, grid) == size


def test_linspace_takes_both_ends_and_tome_the_means_of_pairs():
    x = clip().tokens[0, :N]
    assert SHRINKING["linspace"](x, (H, W), 5).rows.tolist() == [0, 5, 11, 17, 23]
    means = weights(SHRINKING["tome"](x, (H, W), 13))
    assert ((means > 0).sum(0) == 1).all()  # every token is in one of them
    for row in means:
        assert torch.allclose(row[row > 0], row.max())


# -- a model that is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "objects"),
    [
        ('Step 1: yes\nStep 2: ["a", "Dog"]\nStep 3: ["Dog", "red car"]', ["dog", "red car"]),
        ("STEP 1: Yes\nstep 3: ['cat']", ["cat"]),
        ('Step 1: no\nStep 3: ["cat"]', []),
        ("Step 1: yes\nStep 3: []", []),
        ("Step 1: yes\nStep 3: [cat]", []),  # no list of texts
        ("Step 1: yes\nStep 3: [__import__('os')]", []),  # never run
        ("Step 1: yes\nStep 3: [1, 'cat', ' ']", ["cat"]),
        ("nothing of the kind", []),
    ],
)
def test_what_an_answer_lists(answer, objects):
    assert objects_in(answer) == objects


def test_what_is_asked():
    assert asked("Why?", ["cat", "dog"]).startswith("Does the image show any of {cat, dog}?")
    assert asked("Why?", []).startswith("Why?\n")
    assert "Question: Why?" in STEPS.format(question="Why?")


def test_a_judge_gives_the_probability_of_yes():
    model, processor = model_of("qwen2_vl")
    frames = [image(i, *size) for i, size in enumerate([(60, 84), (100, 36), (44, 52)])]
    judge = Judge(model, processor, at_once=2)
    found = judge(frames, "Is there a cat?")
    (letter,) = processor.tokenizer.encode("A", add_special_tokens=False)
    for frame, p in zip(frames, found, strict=True):
        content = [{"type": "image", "image": frame}]
        content.append({"type": "text", "text": asked("Is there a cat?", [])})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        alone = model(**inputs).logits[0, -1].detach().softmax(-1)[letter]
        assert float(p) == pytest.approx(float(alone), abs=1e-6)
    assert not torch.allclose(found, judge(frames, "Is there a cat?", ["kite"]))
    assert judge.objects("What is it about?", max_new_tokens=3) == []


def test_a_judge_refuses_what_it_cannot_ask():
    model, processor = model_of("qwen2_vl")
    with pytest.raises(InputError, match="no frame"):
        Judge(model, processor)([], "Why?")
    with pytest.raises(InputError, match="at_once=0"):
        Judge(model, processor, at_once=0)

    class Plain:
        chat_template = None

    with pytest.raises(UnsupportedError, match="no chat template"):
        Judge(model, Plain())


def test_whole_videos_stay_whole():
    assert Quota(compat=True).counts(clip(), Budget(fraction=1.0)) == [T * N]
