"""Caches that hold some tokens, or all in few bits: by definition, their bytes, what generate does.

Whole matrices say what they should give; the models are in float64, so that no number is rounded to
another step in the one than in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.rules_reference import reference
from tests.engine.test_choosing import probed
from tests.engine.test_computing import BATCHES, Given, rules_of
from tests.families import oracles
from tests.families.test_strategies import FAMILIES
from tests.probes import generate
from vtprune import UnsupportedError
from vtprune.engine.held import Held
from vtprune.eval import tiny as families

STEPS = 13
CACHES: dict[str, dict[str, Any]] = {
    "dropped": {"others": "drop"},
    "packed": {"others": "pack"},
    "dropped again": {"others": "drop", "every": 4},
    "packed again": {"others": "pack", "every": 4},
    "packed alike": {"others": "pack", "bits": (1, 8), "every": 6},
}


def double(shape: str, attention: str = "sdpa") -> tuple[Any, dict[str, Tensor]]:
    inputs = BATCHES[shape]()
    pixels = inputs["pixel_values"].double()
    return tiny.build(attention=attention).double(), {**inputs, "pixel_values": pixels}


def assert_by_definition(model: Any, inputs: dict[str, Tensor], strategy: Given) -> None:
    with vtprune.wrap(model, strategy) as handle:
        ids, logits = generate(model, inputs, STEPS)
    wanted_ids, wanted = reference(model, inputs, rules_of(handle), STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def forced(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of ``ids`` ``[B, n]`` in turn, ``[B, n, V]``."""
    start = inputs["input_ids"].shape[1]

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = ids[:, input_ids.shape[1] - start, None]
        return torch.full_like(scores, -1e30).scatter(1, wanted, 0.0)

    made, logits = generate(model, inputs, ids.shape[1], logits_processor=[force])
    assert torch.equal(made, ids)
    return logits


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor], ids: Tensor, size: int = 1) -> Tensor:
    """The same in a loop of the caller's own, ``size`` tokens at a time."""
    out, mask = model(**inputs), inputs["attention_mask"]
    logits = [out.logits[:, -1:]]
    for some in ids.split(size, dim=1):
        mask = torch.nn.functional.pad(mask, (0, some.shape[1]), value=1)
        out = model(input_ids=some, attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)[:, :-1]


def row(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """One row without its padding."""
    images = ((inputs["input_ids"] == tiny.IMAGE).sum(1) // tiny.N).tolist()
    ids = inputs["input_ids"][b, inputs["attention_mask"][b].bool()][None]
    pixels = inputs["pixel_values"].split(images)[b]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize(
    ("shape", "attention"), [*((shape, "sdpa") for shape in BATCHES), ("ragged", "eager")]
)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_gives_what_it_should_by_definition(cache, shape, attention):
    assert_by_definition(*double(shape, attention), probed(0.5, **CACHES[cache]))


@pytest.mark.parametrize("others", ["drop", "keep"])
def test_where_all_are_chosen_again_it_is_the_unwrapped_model(others):
    model, inputs = tiny.build(), tiny.one_image()
    ids, logits = generate(model, inputs)
    with vtprune.wrap(model, probed(1.0, others, every=3)):
        same_ids, same = generate(model, inputs)
    assert torch.equal(ids, same_ids)
    assert torch.equal(logits, same)


@pytest.mark.parametrize("shape", ["one", "ragged"])
def test_more_bits_are_closer_to_the_model(shape):
    """Where all attend in the prompt, bits are all that differs."""
    model, inputs = tiny.build(), BATCHES[shape]()
    ids, plain = generate(model, inputs)
    scale, errors = plain.std(), []
    for bits in ((8, 8), (4, 4), (2, 2)):
        with vtprune.wrap(model, probed(1.0, "pack", bits=bits)):
            errors.append((forced(model, inputs, ids) - plain)[:, 1:].square().mean().sqrt())
    near, half, far = (float(error / scale) for error in errors)
    assert near < 0.01
    assert 8 * near < half < 0.15
    assert 2 * half < far < 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_in_8_bits_every_family_is_near_whole_caches(family):
    model, inputs = oracles.model_of(family)[0], oracles.inputs_of(family, "ragged")
    with vtprune.wrap(model, "zipvl", tau=0.8, others="keep"):
        ids, wanted = generate(model, inputs)
    with vtprune.wrap(model, "zipvl", tau=0.8, others="pack", bits=(8, 8), every=4):
        made = forced(model, inputs, ids)
    assert (made - wanted)[:, :1].abs().max() < 1e-4
    assert (made - wanted).square().mean().sqrt() < 0.01 * wanted.std()


# -- bytes -----------------------------------------------------------------------------------------


def tensors(layer: Held) -> Iterator[Tensor]:
    yield from (layer.keys, layer.values)
    for part in (part for pair in layer.parts for part in pair):
        yield from (part.codes, part.step, part.low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("others", ["drop", "pack"])
def test_the_report_says_the_bytes_in_memory(others, shape, dtype):
    """Of the storages, which a view would keep alive as a whole."""
    model, inputs = tiny.build().to(dtype), BATCHES[shape]()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    whole = model(**inputs).past_key_values
    with vtprune.wrap(model, probed(0.5, others)) as handle:
        cache = model(**inputs).past_key_values
        report = handle.report().cache
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in cache.layers
        for x in tensors(layer)
    }
    assert report is not None
    assert report.held == report.allocated == sum(storages.values())
    full = sum(x.nbytes for layer in whole.layers for x in (layer.keys, layer.values))
    assert report.unpruned == full
    assert 0 < report.held < full


def test_bytes_of_packed_keys_and_values():
    """2 heads of 8 channels: keys in groups of 32 tokens per channel, values in one per token."""
    model, inputs = tiny.build().to(torch.bfloat16), tiny.one_image()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with vtprune.wrap(model, "zipvl", tau=0.3, others="pack") as handle:
        cache = model(**inputs).past_key_values
        chosen = handle._decoding.chosen  # type: ignore[union-attr]
    n, limits = inputs["input_ids"].shape[1], 4
    for number, layer in enumerate(cache.layers):
        few, total = int((chosen[number].index >= 0).sum()), 0
        for count, bits in ((few, 4), (n - few, 2)):
            group = 32 * bits // 8 + limits
            total += 2 * 8 * -(-count // 32) * group + 2 * count * group
        assert layer.nbytes == total


def test_all_that_was_decoded_is_settled_in_turn():
    model, inputs = tiny.build(), tiny.ragged()
    n = inputs["input_ids"].shape[1]
    ids = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(1))
    with vtprune.wrap(model, probed(0.3, "drop", every=4)) as handle:
        by_hand(model, inputs, ids)
        layers = list(handle._decoding.held.values())  # type: ignore[union-attr]
    assert len(layers) == 4
    for layer in layers:
        decoded = [(index >= n).sum() for index in layer.cut.index]
        assert (layer.cut.length, layer.seen) == (n + 8, 3)
        assert layer.get_seq_length() == n + 11
        assert all(2 <= count < 8 for count in decoded)
        assert layer.keys.shape[2] == layer.cut.index.shape[1] + 3


# -- what generate and callers do with a cache -----------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_tokens_given_in_pieces(cache):
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(2))
    with vtprune.wrap(model, probed(0.5, **CACHES[cache])):
        one, more = by_hand(model, inputs, ids), by_hand(model, inputs, ids, 2)
    assert (one - more).abs().max() < 1e-4


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_is_cached_alone_as_in_a_batch(cache):
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with vtprune.wrap(model, probed(0.5, **CACHES[cache])):
        both = forced(model, inputs, ids)
        alone = [forced(model, row(inputs, b), ids[b : b + 1]) for b in range(2)]
    assert (both - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("cache", ["dropped again", "packed again"])
@pytest.mark.parametrize("first", ["divprune", "fastv", "pyramiddrop"])
def test_behind_strategies_that_drop(first, cache):
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(4))
    with vtprune.wrap(model, [first, probed(0.5, **CACHES[cache])], keep=0.6):
        both = forced(model, inputs, ids)
        alone = [forced(model, row(inputs, b), ids[b : b + 1]) for b in range(2)]
    assert (both - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("others", ["drop", "pack"])
def test_a_sliding_window_that_does_not_hold_all(others):
    model, inputs = families.build("gemma3")[0], oracles.inputs_of("gemma3", "one")
    length = inputs["input_ids"].shape[1] + 8
    for layer in model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = length
    with vtprune.wrap(model, "zipvl", others=others, every=3):
        generate(model, inputs, 5)
        with pytest.raises(UnsupportedError, match=f"do not go with more than {length} tokens"):
            generate(model, inputs, 12)


@pytest.mark.parametrize("others", ["drop", "pack"])
@torch.no_grad()
def test_decoded_tokens_that_the_caller_hides(others):
    """A row that ended earlier has nothing to choose from, and the other one is not touched."""
    model, inputs = double("ragged")
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(5))
    ones = torch.ones(2, 1, dtype=torch.long)
    with vtprune.wrap(model, probed(0.5, others, every=4)) as handle:
        out, mask, logits = model(**inputs), inputs["attention_mask"], []
        for i in range(9):
            mask = torch.cat([mask, ones if i == 0 else torch.tensor([[1], [0]])], dim=1)
            cache = out.past_key_values
            out = model(input_ids=ids[:, i : i + 1], attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
        assert handle._decoding.held[1].seen == 1  # type: ignore[union-attr]
        plain = by_hand(model, inputs, torch.cat([ids, ids[:, :1]], dim=1))[:, 1:]
    assert (torch.cat(logits, 1) - plain)[0].abs().max() < 1e-4


def assert_beams(cache: str) -> None:
    """Holds that a beam's score is that of its tokens, read alone."""
    model, prompts = tiny.build().double(), [tiny.prompt(2, 6, 1, 2), tiny.prompt(4, 3, 1, 3)]
    inputs = tiny.batch(*prompts)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with vtprune.wrap(model, probed(0.5, **CACHES[cache])):
        options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
        out = model.generate(**inputs, max_new_tokens=STEPS, output_scores=True, **options)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        scores = []
        for i, sequence in enumerate(ids):
            logits = forced(model, row(inputs, i // 3), sequence[None])
            logits = logits.log_softmax(-1).gather(2, sequence[None, :, None])
            scores.append(float(logits.mean()))
    assert torch.allclose(out.sequences_scores.float(), torch.tensor(scores), atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_beams_take_their_cache_along(cache):
    assert_beams(cache)


@pytest.mark.parametrize("cache", CACHES)
def test_sampled_sequences_are_cached_each_by_itself(cache):
    model, inputs = double("one")
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with vtprune.wrap(model, probed(0.5, **CACHES[cache])):
        torch.manual_seed(0)
        out = model.generate(**inputs, **options, max_new_tokens=STEPS)
        ids = out.sequences[:, -STEPS:]
        alone = torch.cat([forced(model, inputs, one[None]) for one in ids])
    assert not torch.equal(ids[0], ids[1])
    assert (torch.stack(out.logits, 1) - alone).abs().max() < 1e-4


@pytest.mark.parametrize("others", ["drop", "pack"])
def test_a_long_answer_drops_by_default_every_100(others):
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "zipvl", tau=0.3, others=others) as handle:
        generate(model, inputs, 205)
        layers = list(handle._decoding.held.values())  # type: ignore[union-attr]
    n = inputs["input_ids"].shape[1]
    assert [(layer.cut.length, layer.seen) for layer in layers] == [(n + 200, 4)] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", CACHES)
def test_half_precision(cache, dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, probed(0.5, **CACHES[cache])):
        assert generate(model, inputs)[1].isfinite().all()
