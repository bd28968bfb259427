"""Figures of an analysis: as counted token by token from eager attention and hidden states."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import vtprune
from tests import tiny
from vtprune import ConfigError
from vtprune.engine.onlooker import Onlooker, Seen
from vtprune.eval.analyze_maps import Maps, survivors
from vtprune.eval.analyze_sinks import (
    MASSIVE,
    Places,
    discover,
    first_tokens,
    parse_dims,
    score_of,
)
from vtprune.eval.analyze_stats import NAMES, Figures, layers_of, quantities, stages_of

DIMS, TAU, NEW = (3, 17, 30), 1.5, 4


@cache
def eager(keep=None):
    """Attention of generated tokens ``[NL][T - 1]``, entering states, and columns, by eager."""
    model, inputs = tiny.build(attention="eager"), tiny.ragged()
    handle = None if keep is None else vtprune.wrap(model, "fastervlm", keep=keep)
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    mask = inputs["attention_mask"].bool()
    index = torch.arange(mask.shape[1]).expand(mask.shape).masked_fill(~mask, -1)
    if handle is not None:
        index = handle.index
        handle.remove()
    return out.attentions[1:], out.hidden_states[0], index


def seen_of(inputs, keep=None):
    model = tiny.build()
    handle = None if keep is None else vtprune.wrap(model, "fastervlm", keep=keep)
    onlooker = Onlooker(model, inputs, score_of(DIMS), handle)
    with onlooker.looking():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    seen = onlooker.seen(ids[:, inputs["input_ids"].shape[1] :], ())
    left = None if handle is None else survivors(handle, seen)
    if handle is not None:
        handle.remove()
    return seen, left


def by_hand(inputs, layer, b, keep, exclude_bos):
    """The quantities of one sample in one layer, one token after the other."""
    steps, hidden, index = eager(keep)
    assert index is not None
    ids, columns = inputs["input_ids"][b].tolist(), index[b].tolist()
    mean = [float(sum(s[layer][b, :, -1, i].mean() for s in steps)) / len(steps)
            for i in range(len(columns))]  # fmt: skip
    rows = [s[layer][b, :, -1] for s in steps]
    entropy = [float(-(r[r > 0] * r[r > 0].log()).sum() / len(r)) for r in rows]
    first = min(c for c in columns if c >= 0)
    mass = {"text": 0.0, "visual": 0.0}
    count = {"text": 0, "visual": 0}
    sinks = {"text": 0, "visual": 0}
    to = {"text": 0.0, "visual": 0.0}
    for i, column in enumerate(columns):
        if column < 0:
            continue
        kind = "visual" if ids[column] == tiny.IMAGE else "text"
        state = hidden[layer][b, i].tolist()
        scale = math.sqrt(sum(x * x for x in state) / len(state) + 1e-6)
        if max(abs(state[d]) for d in DIMS) / scale > TAU:
            sinks[kind] += 1
            to[kind] += mean[i]
        if not (exclude_bos and column == first):
            mass[kind] += mean[i]
            count[kind] += 1
    every, tokens = mass["text"] + mass["visual"], count["text"] + count["visual"]
    return {
        "text": count["text"],
        "visual": count["visual"],
        "mdi": (mass["text"] / count["text"]) / (mass["visual"] / count["visual"]),
        "aei_text": (mass["text"] / every) / (count["text"] / tokens),
        "aei_visual": (mass["visual"] / every) / (count["visual"] / tokens),
        "entropy": sum(entropy) / len(entropy),
        "text_sinks": sinks["text"],
        "visual_sinks": sinks["visual"],
        "to_text_sinks": to["text"],
        "to_visual_sinks": to["visual"],
        "to_first": mean[columns.index(first)],
    }


@pytest.mark.parametrize("keep", [None, 0.25])
@pytest.mark.parametrize("exclude_bos", [False, True])
def test_quantities_are_those_counted_by_hand(keep, exclude_bos):
    inputs = tiny.ragged()
    found = quantities(seen_of(inputs, keep)[0], TAU, exclude_bos)
    sinks = 0
    for b in range(2):
        for layer in (0, 2, 3):
            wanted = by_hand(inputs, layer, b, keep, exclude_bos)
            got = {name: float(found[name][layer, b]) for name in wanted}
            assert got == pytest.approx(wanted, rel=2e-4, abs=1e-6), (b, layer)
            sinks += wanted["text_sinks"] * wanted["visual_sinks"]
    assert sinks > 0  # of both kinds, so that counts mean something


def test_means_and_ratios_of_means():
    seen, _ = seen_of(tiny.ragged())
    found = quantities(seen, TAU)
    layers = layers_of([found, found])
    assert len(layers) == 4
    for number, layer in enumerate(layers):
        assert layer.mdi == pytest.approx(float(found["mdi"][number].mean()))
        above, below = (found[f"per_{kind}"][number].mean() for kind in ("text", "visual"))
        assert layer.mdi_of_means == pytest.approx(float(above / below))
        share, part = (found[f"{what}_text"][number].mean() for what in ("attention", "share"))
        assert layer.aei_text_of_means == pytest.approx(float(share / part))
        assert layer.mdi != pytest.approx(layer.mdi_of_means, rel=1e-6)
    early, middle, late = stages_of(layers)
    values = [layer.mdi or 0.0 for layer in layers]
    pairs = zip((early, middle, late), ((0, 1), (1, 2), (2, 3)), strict=True)
    for stage, (a, b) in pairs:
        assert stage.mdi == pytest.approx((values[a] + values[b]) / 2)


def made(attention, scores, there=None, mixed=False):
    """One layer and one sample: three words around two visual tokens."""
    attention = torch.tensor(attention)[None, None]
    mask = torch.ones(1, 5, dtype=torch.bool)
    visual = torch.tensor([[0, 1, 1, 0, 0]]).bool()
    there = mask[None] if there is None else torch.tensor(there).bool()[None, None]
    scores = torch.tensor(scores)[None, None]
    return Seen(
        attention,
        torch.ones(1, 1),
        there,
        scores,
        mask,
        visual,
        torch.ones(1).long(),
        torch.tensor([mixed]),
    )


def test_a_sample_without_visual_tokens_is_no_ratio():
    nan = float("nan")
    whole = made([0.2, 0.1, 0.1, 0.3, 0.1], [9.0, 0.0, 9.0, 0.0, 0.0])
    gone = made([0.2, 0.0, 0.0, 0.3, 0.1], [9.0, nan, nan, 0.0, 0.0], [1, 0, 0, 1, 1])
    (figures,) = layers_of([quantities(whole, 5.0), quantities(gone, 5.0)])
    assert figures.mdi == pytest.approx((0.6 / 3) / (0.2 / 2))
    assert figures.mdi_of_means == pytest.approx(figures.mdi)
    assert (figures.visual, figures.text) == (1, 3)
    assert (figures.text_sinks, figures.visual_sinks) == (1, 0.5)
    assert figures.to_visual_sinks == pytest.approx(0.05)
    (none,) = layers_of([quantities(gone, 5.0)])
    assert none.mdi is None and none.aei_visual is None and none.entropy == 1
    assert {f.mdi for f in stages_of([figures, none])} == {None}
    assert set(NAMES) == set(Figures.__dataclass_fields__)


def test_heads_that_hold_different_tokens_do_not_say_which_draws():
    seen = made([0.4, 0.1, 0.2, 0.2, 0.1], [9.0, 0.0, 9.0, 0.0, 9.0], mixed=True)
    (figures,) = layers_of([quantities(seen, 5.0)])
    assert figures.to_visual_sinks is None and figures.visual_sinks == 1
    assert figures.to_text_sinks == pytest.approx(0.5)
    assert figures.mdi == pytest.approx((0.7 / 3) / (0.3 / 2))
    places = Places(str)
    places.add(seen, torch.tensor([[1, 90, 90, 7, 8]]), [None], 5.0)
    drawn = {p.kind: p.attention for p in places.top()}
    assert drawn["visual"] is None and drawn["text"] is not None
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "snapkv", keep=9) as handle:
        onlooker = Onlooker(model, inputs, score_of(DIMS), handle)
        with onlooker.looking():
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        held = onlooker.seen(ids[:, inputs["input_ids"].shape[1] :], ())
    assert held.mixed.all()
    assert (held.there & held.visual).sum(-1).flatten().tolist() == [9] * 4


def test_places_of_sinks_are_named():
    seen = made([0.4, 0.1, 0.2, 0.2, 0.1], [9.0, 0.0, 9.0, 0.0, 9.0])
    places = Places(lambda token: f"w{token}")
    ids = torch.tensor([[1, 90, 90, 7, 8]])
    for grid in ((1, 1, 2), (2, 1, 1), None):
        places.add(seen, ids, [grid], 5.0)
    found = {(p.kind, p.where): (p.sink, p.attention) for p in places.top()}
    third = pytest.approx(1 / 3)
    assert found == {
        ("text", "'w1', token 0"): (1, pytest.approx(0.4)),
        ("text", "'w8', token -1"): (1, pytest.approx(0.1)),
        ("visual", "row 0, column 1"): (third, pytest.approx(0.2)),
        ("visual", "frame 1, row 0, column 0"): (third, pytest.approx(0.2)),
        ("visual", "token 1"): (third, pytest.approx(0.2)),
    }
    assert [p.where for p in places.top()][:2] == ["'w1', token 0", "'w8', token -1"]


def test_dimensions_that_are_large_in_the_first_token():
    firsts = torch.randn(8, 3, 600, generator=torch.Generator().manual_seed(0)) * 0.1
    assert discover(firsts, 20.0) == ()
    firsts[2:6, :, 11] = 40.0  # in the middle layers
    firsts[7, :, 5] = 40.0  # in the last alone
    firsts[2, :, 9] = 40.0
    assert discover(firsts, 20.0) == (11,)
    massive = torch.full((4, 1, 600), 0.01)
    massive[:, :, :9] = 0.02 * MASSIVE  # nine share what is large: none has 20 times the mean
    assert discover(massive, 20.0) == tuple(range(9))
    assert discover(massive[..., 1:], 100.0) == tuple(range(8))


def test_first_tokens_are_those_behind_the_padding():
    inputs = tiny.ragged()
    out = tiny.build(attention="eager")(**inputs, output_hidden_states=True, use_cache=False)
    first = inputs["attention_mask"].argmax(1)
    wanted = torch.stack([h[torch.arange(2), first] for h in out.hidden_states[:-1]])
    assert first.tolist() != [0, 0]
    torch.testing.assert_close(first_tokens(tiny.build(), inputs), wanted, atol=1e-5, rtol=1e-4)


def test_options_of_sinks():
    assert parse_dims("auto", 32) == (True, ())
    assert parse_dims("3,auto,31,3", 32) == (True, (3, 31))
    assert parse_dims("7", 32) == (False, (7,))
    for text in ("32", "-1", "x", "", "1.5"):
        with pytest.raises(ConfigError, match="--sink-dims"):
            parse_dims(text, 32)
    assert not score_of(())(torch.ones(1, 2, 3)).any()


def test_survivors_and_maps():
    inputs = tiny.one_image()
    seen, left = seen_of(inputs, 0.25)
    model = tiny.build()
    with vtprune.wrap(model, "fastervlm", keep=0.25) as handle:
        model(**inputs)
        slots = handle.selections[0].slots[0]
    assert left is not None and torch.equal(left[0, seen.visual[0]].nonzero()[:, 0], slots)
    maps, side = Maps(), 6
    every = seen.visual
    maps.add(left, seen.visual, [(1, side, side)])
    maps.add(every, seen.visual, [(1, side, side)])
    maps.add(every, seen.visual, [None])
    maps.add(every, seen.visual, [(4, 3, 3)])
    first, second = maps.maps()
    assert (first.grid, first.n) == ((1, side, side), 2)
    share = torch.full((36,), 0.5)
    share[slots] = 1.0
    assert torch.equal(torch.tensor(first.share), share.view(side, side))
    assert (second.grid, len(second.share), len(second.share[0])) == ((4, 3, 3), 12, 3)
