"""Caches that entries left: what generate does with them, what is refused, what reports say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_held import by_hand, double, forced, row
from tests.probes import generate
from vtprune import ConfigError, InputError, UnsupportedError
from vtprune.engine.held import Held
from vtprune.errors import HookError
from vtprune.evicting import Entries, Kept
from vtprune.flops import Shape
from vtprune.registry import build
from vtprune.strategies._cache import Cached
from vtprune.types import Budget

NAMES = ("snapkv", "lookm")
each = pytest.mark.parametrize("name", NAMES)


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [tiny.one_image, tiny.ragged])
def test_where_all_stays_it_is_bit_identical(name, attention, shape):
    model, inputs = tiny.build(attention=attention), shape()
    ids, logits = generate(model, inputs)
    with vtprune.wrap(model, name, keep=1.0) as handle:
        same_ids, same = generate(model, inputs)
        assert not handle._decoding.held  # type: ignore[union-attr]
    assert torch.equal(ids, same_ids)
    assert torch.equal(logits, same)


@each
def test_the_prompt_is_read_as_ever_and_caches_hold_so_many(name):
    model, inputs = tiny.build(), tiny.one_image()
    whole, n = model(**inputs), inputs["input_ids"].shape[1]
    with vtprune.wrap(model, name, keep=7, layers=(1, 3)) as handle:
        out = model(**inputs)
        report = handle.report()
    assert torch.equal(out.logits, whole.logits)
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [n, n - tiny.N + 7, n, n - tiny.N + 7]
    assert out.past_key_values.get_seq_length(1) == n
    assert report.entering(0) == (tiny.N,) * 4
    assert report.caching(0) == (tiny.N, 7, tiny.N, 7)
    assert report.cache is not None
    sizes = [x.nbytes for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
    assert report.cache.held == report.cache.allocated == sum(sizes)
    assert report.cache.share == pytest.approx(sum(held) / (4 * n))
    assert "caches of layers [1, 3] (row 0): 7 of 36 visual tokens per head" in str(report)
    shape, words = Shape.of(model.config.text_config), n - tiny.N
    assert report.prefill().share == 1
    assert report.decode(3).macs == shape.decode([words + k for k in report.caching(0)], 3)


@each
def test_rows_hold_so_many_each_by_itself(name):
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, name, keep=0.25) as handle:
        cache = model(**inputs).past_key_values
        held = handle.report().held
    words = inputs["attention_mask"].sum(1) - torch.tensor([1, 2]) * tiny.N
    assert {(one.sample, one.tokens, one.kept) for one in held} == {(0, 36, 9), (1, 72, 18)}
    for layer in cache.layers:
        assert isinstance(layer, Held)
        assert layer.cut.valid.sum(1).tolist() == (words + torch.tensor([9, 18])).tolist()


@each
def test_heads_hold_tokens_of_their_own(name):
    """The first key of a head is that of its first token; what all hold comes first."""
    model, inputs = tiny.build(), tiny.one_image()
    whole = model(**inputs).past_key_values
    with vtprune.wrap(model, name, keep=5, merge="none"):
        few = model(**inputs).past_key_values
    differ = 0
    for one, other in zip(whole.layers, few.layers, strict=True):
        same = (one.keys[0, :, :, None] == other.keys[0, :, None]).all(-1)
        assert bool((same.sum(1) == 1).all())
        columns = same.long().argmax(1)
        differ += int((columns[0] != columns[1]).any())
        assert torch.equal(other.cut.index[0], columns[0])
        values = one.values[0].gather(1, columns[..., None].expand(-1, -1, 8))
        assert torch.equal(values, other.values[0])
    assert differ


@each
def test_a_decode_loop_by_hand_and_tokens_in_pieces(name):
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 8), generator=torch.Generator().manual_seed(2))
    with vtprune.wrap(model, name, keep=0.3):
        wanted = forced(model, inputs, ids)
        one, more = by_hand(model, inputs, ids), by_hand(model, inputs, ids, 2)
    assert (one - wanted).abs().max() < 1e-5  # generate hands out logits in float32
    assert (one - more).abs().max() < 1e-9


@each
@pytest.mark.parametrize(
    "first",
    [None, "fastv", *(pytest.param(f, marks=pytest.mark.slow) for f in ("divprune", "shortv"))],
)
def test_a_row_is_cached_alone_as_in_a_batch(name, first):
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 5), generator=torch.Generator().manual_seed(3))
    strategy: Any = name if first is None else [first, name]
    keep: Any = [0.6, 0.4] if first in ("divprune", "fastv") else 0.4
    with vtprune.wrap(model, strategy, keep=keep):
        both = forced(model, inputs, ids)
        alone = [forced(model, row(inputs, b), ids[b : b + 1]) for b in range(2)]
    assert (both - torch.cat(alone)).abs().max() < 1e-9


@each
def test_beams_take_their_cache_along(name):
    model, prompts = tiny.build().double(), [tiny.prompt(2, 6, 1, 2), tiny.prompt(4, 3, 1, 3)]
    inputs = tiny.batch(*prompts)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    with vtprune.wrap(model, name, keep=6):
        out = model.generate(**inputs, max_new_tokens=6, output_scores=True, **options)
        ids, scores = out.sequences[:, inputs["input_ids"].shape[1] :], []
        for i, sequence in enumerate(ids):
            logits = forced(model, row(inputs, i // 3), sequence[None])
            logits = logits.log_softmax(-1).gather(2, sequence[None, :, None])
            scores.append(float(logits.mean()))
    assert torch.allclose(out.sequences_scores.float(), torch.tensor(scores), atol=1e-4)


def test_prompts_without_images_keep_all():
    model = tiny.build()
    inputs = tiny.batch(tiny.prompt(5, 4, 0, 1), tiny.prompt(2, 6, 1, 2))
    with vtprune.wrap(model, "snapkv", keep=4) as handle:
        ids = generate(model, inputs)[0]
        assert {one.sample for one in handle.report().held} == {1}
    text = {name: inputs[name][:1, -9:] for name in ("input_ids", "attention_mask")}
    assert torch.equal(ids[:1], generate(model, text)[0])


# -- what is refused -------------------------------------------------------------------------------


@each
def test_a_cache_of_a_fixed_length_is_refused(name):
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, name, keep=4),
        pytest.raises(UnsupportedError, match=r"leave its cache\. Leave cache_implementation out"),
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@each
@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_ways_of_generating_without_one_whole_prefill_are_refused(name, options):
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, name, keep=4), pytest.raises(UnsupportedError, match="does not go"):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_two_that_say_what_a_cache_holds_are_refused():
    model = tiny.build()
    for strategies, keep in ((["snapkv", "lookm"], [4, 4]), (["zipvl", "snapkv"], 4)):
        with pytest.raises(ConfigError, match="what the cache of layer 0 holds"):
            vtprune.wrap(model, strategies, keep=keep)
        with pytest.raises(ConfigError, match="what the cache of layer 0 holds"):
            vtprune.wrap(model, strategies[::-1], keep=keep)
    apart = [build("snapkv", layers=(0, 1)), build("lookm", layers=(2, 3))]
    with vtprune.wrap(model, apart, keep=[4, 5]) as handle:
        model(**tiny.one_image())
        assert handle.report().caching(0) == (4, 4, 5, 5)


def test_bad_options_are_refused():
    for name, options, message in [
        ("snapkv", {"merge": "mean"}, "merge='mean' is unknown"),
        ("snapkv", {"window": 0}, "window=0 is no number of tokens"),
        ("snapkv", {"window": True}, "window=True is no number"),
        ("snapkv", {"side": 2}, "side=2 has no middle"),
        ("snapkv", {"run": 0}, "run=0 has no middle"),
        ("lookm", {"recent": 1.0}, r"recent=1.0 is no share"),
        ("lookm", {"merge": ""}, "merge='' is unknown"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(name, **options)
    with pytest.raises(ConfigError, match=r"keep=0.05 is less than recent=0.1"):
        vtprune.wrap(tiny.build(), "lookm", keep=0.05, compat=True)
    with pytest.raises(ConfigError, match="keep is missing"):
        vtprune.wrap(tiny.build(), "snapkv")


@dataclass(frozen=True)
class Uneven(Cached):
    """Lets a token of the first head leave."""

    def evict(self, entries: Entries, budget: Budget) -> Kept:
        stays = torch.ones(entries.k.shape[:2], dtype=torch.bool)
        stays[0, 6] = False
        return Kept(stays)


def test_heads_that_keep_unequal_numbers_are_refused():
    model = tiny.build()
    with vtprune.wrap(model, Uneven(), keep=4), pytest.raises(InputError, match="equally many"):
        model(**tiny.one_image())


def test_attention_that_passes_the_tap_by_is_noticed(monkeypatch):
    from vtprune.engine.evicting import Evicting

    monkeypatch.setattr(Evicting, "_note", lambda *args: None)
    model = tiny.build()
    with vtprune.wrap(model, "snapkv", keep=4), pytest.raises(HookError, match="did not call"):
        model(**tiny.one_image())


@each
def test_the_model_is_as_it_was(name):
    model, inputs = tiny.build(), tiny.one_image()
    ids, logits = generate(model, inputs)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with vtprune.wrap(model, name, keep=4):
        generate(model, inputs)
    after_ids, after = generate(model, inputs)
    assert torch.equal(ids, after_ids)
    assert torch.equal(logits, after)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
