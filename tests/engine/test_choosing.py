"""Attention among tokens that probes choose: as by definition, smaller caches, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_computing import BATCHES, Given, assert_by_definition
from tests.probes import generate
from vtprune import UnsupportedError
from vtprune.engine import choosing, computing
from vtprune.engine.cuts import Cut
from vtprune.engine.decoding import Decoding
from vtprune.registry import build
from vtprune.rules import Others, RowRule
from vtprune.strategies import zipvl


def probed(tau: float, others: Others = "drop", **cache: Any) -> Given:
    """Layers in which probes choose, and what becomes of the others in the cache."""
    return Given(given=RowRule("chosen", chooser=zipvl.ZipVL(tau=tau), others=others, **cache))


def lengths(model, inputs, strategy) -> list[int]:
    """Entries of each layer's cache after the prompt."""
    with vtprune.wrap(model, strategy):
        cache = model(**inputs).past_key_values
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("tau", [0.2, 0.5, 0.8])
def test_attention_among_the_chosen_equals_its_definition(tau, shape, attention):
    model, inputs = tiny.build(attention=attention), BATCHES[shape]()
    assert_by_definition(model, inputs, probed(tau))
    assert_by_definition(model, inputs, probed(tau, "keep"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
def test_where_all_are_chosen_it_is_the_unwrapped_model(shape, attention):
    model, inputs = tiny.build(attention=attention), BATCHES[shape]()
    ids, logits = generate(model, inputs)
    with vtprune.wrap(model, probed(1.0)) as handle:
        same_ids, same = generate(model, inputs)
        columns = [cut.index for cut in handle._decoding.chosen.values()]  # type: ignore[union-attr]
    valid = inputs["attention_mask"].bool()
    assert all(torch.equal((index >= 0).sum(1), valid.sum(1)) for index in columns)
    assert torch.equal(ids, same_ids)
    if shape == "one":
        assert torch.equal(logits, same)
    assert (logits - same).abs().max() < 1e-5


def test_caches_hold_the_chosen_alone():
    model, inputs = tiny.build(), tiny.one_image()
    n = inputs["input_ids"].shape[1]
    few, more = (lengths(model, inputs, build("zipvl", tau=tau)) for tau in (0.3, 0.8))
    assert all(n - tiny.N < a < b < n for a, b in zip(few, more, strict=True))
    assert lengths(model, inputs, probed(0.3, "keep")) == [n] * 4


def test_the_report_says_what_caches_hold_and_what_was_computed():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "zipvl", tau=0.3) as handle:
        cache = model(**inputs).past_key_values
        report = handle.report()
        chosen = handle._decoding.chosen  # type: ignore[union-attr]
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert report.cache is not None
    assert report.rules is not None
    assert report.cache.held == held < report.cache.unpruned
    assert (
        "attend if chosen by ZipVL(layers=None, exclude_sinks=False, tau=0.3, others='drop', "
        in str(report)
    )
    rows, text = inputs["input_ids"].shape[1], model.config.text_config
    d, m = text.hidden_size, text.intermediate_size
    full = rows * (3 * d**2 + 3 * d * m) + 2 * rows**2 * d
    spared = sum(2 * (rows**2 - cut.index.shape[1] ** 2) * d for cut in chosen.values())
    assert report.rules.realised == pytest.approx(1 - spared / (4 * full))
    words = rows - tiny.N
    whole = 4 * tiny.N * d**2 + 2 * tiny.N**2 * d + 3 * tiny.N * d * m
    few = [2 * (tiny.N**2 - (cut.index.shape[1] - words) ** 2) * d for cut in chosen.values()]
    assert report.rules.published == pytest.approx(1 - sum(few) / (4 * whole))


def test_a_decode_loop_by_hand_hides_what_left_the_cache():
    model, inputs, strategy = tiny.build(), tiny.ragged(), probed(0.3)
    with vtprune.wrap(model, strategy):
        wanted, _ = generate(model, inputs, n=5)
        out, mask, ids = model(**inputs), inputs["attention_mask"], []
        for _ in range(5):
            scores = out.logits[:, -1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30)
            ids.append(scores.argmax(-1))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            cache = out.past_key_values
            out = model(input_ids=ids[-1][:, None], attention_mask=mask, past_key_values=cache)
    assert torch.equal(torch.stack(ids, 1), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, probed(0.5)):
        logits = model(**inputs).logits
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


def test_a_row_chooses_alone_as_in_a_batch():
    model, inputs = tiny.build(), tiny.ragged()
    images = (inputs["input_ids"] == tiny.IMAGE).sum(1) // tiny.N
    pixels, alone = inputs["pixel_values"].split(images.tolist()), []
    with vtprune.wrap(model, probed(0.4)):
        both = generate(model, inputs)[1]
        for b, valid in enumerate(inputs["attention_mask"].bool()):
            ids = inputs["input_ids"][b, valid][None]
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            alone.append(generate(model, {**row, "pixel_values": pixels[b]})[1])
    assert (both - torch.cat(alone)).abs().max() < 1e-4


def test_copies_of_a_row_choose_as_it_does():
    model, inputs = tiny.build(), tiny.one_image()
    options = {"max_new_tokens": 6, "do_sample": False}
    with vtprune.wrap(model, probed(0.3)) as handle:
        greedy = model.generate(**inputs, **options)
        model.generate(**inputs, **options, num_beams=3)
        for cut in handle._decoding.chosen.values():  # type: ignore[union-attr]
            assert torch.equal(cut.index, cut.index[:1].expand(3, -1))
        options = {**options, "do_sample": True, "top_k": 1}
        twice = model.generate(**inputs, **options, num_return_sequences=2)
    assert torch.equal(twice, greedy.expand(2, -1))


def test_a_cache_of_a_fixed_length_is_refused():
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, "zipvl"),
        pytest.raises(UnsupportedError, match=r"leave its cache\. Leave cache_implementation out"),
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


# -- faults that must be noticed -------------------------------------------------------------------


def goes_red(patch, where, name, fault, error: type[Exception] = AssertionError):
    """Holds that the oracle is red with the fault in place."""
    patch.setattr(where, name, fault)
    with pytest.raises(error):
        assert_by_definition(tiny.build(), BATCHES["ragged"](), probed(0.3))


def test_keys_of_other_tokens(monkeypatch):
    right = choosing.pick
    goes_red(monkeypatch, choosing, "pick", lambda x, index: right(x, index.roll(1, 1)))


def test_answers_in_other_rows(monkeypatch):
    right = Cut.spread
    goes_red(monkeypatch, Cut, "spread", lambda cut, x, n: right(cut, x, n).roll(1, 1))


def test_a_sum_that_does_not_count_who_sees(monkeypatch):
    goes_red(monkeypatch, zipvl, "per_viewer", lambda mass, seen: mass)


def test_another_number(monkeypatch):
    right = zipvl.needed
    goes_red(monkeypatch, zipvl, "needed", lambda *args: (right(*args) - 4).clamp(min=1))


def test_probes_that_see_what_comes_after_them(monkeypatch):
    right = zipvl.accumulated
    fault = lambda q, k, seen, scale: right(q, k, seen | True, scale)  # noqa: E731
    goes_red(monkeypatch, zipvl, "accumulated", fault)


def test_text_that_may_not_be_chosen(monkeypatch):
    right = choosing._chosen
    goes_red(monkeypatch, choosing, "_chosen", lambda *args: right(*args) & args[6])


def test_a_decode_mask_that_is_not_cut(monkeypatch):
    goes_red(monkeypatch, Decoding, "cached", Decoding.cut, RuntimeError)


def test_a_cache_that_is_not_shortened(monkeypatch):
    goes_red(monkeypatch, computing, "settle", lambda *args: None)
