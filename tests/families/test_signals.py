"""Oracle 3: what strategies receive equals what an eager copy's probabilities give.

The eager copy, and what each token is made of, come from ``eager.py``, which asks no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.families import prompts
from tests.families.eager import (
    TOWERS,
    encode,
    flat,
    inputs_of,
    lengths,
    mapping,
    modalities,
    model_of,
    patches,
    recording,
    touched,
    wanted,
)
from tests.families.eager_inside import INSIDE
from tests.probes import Spy
from vtprune.engine import tap
from vtprune.engine.plan import find_adapter
from vtprune.eval import tiny
from vtprune.strategies.fastv import FastV
from vtprune.types import DecoderNeed, Facts, LastRow, Received, Signals, Site, Stage

FAMILIES = tiny.names()
CASES = [(family, kind) for family in FAMILIES for kind in prompts.kinds(family)]


@dataclass(frozen=True)
class Watched(FastV):
    """FastV by any quantity of the layer before, that keeps the received signals."""

    need: type[DecoderNeed] = LastRow
    seen: list[Signals] = field(default_factory=list)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        (layer,) = self.used_layers(facts)
        return (Stage(Site.DECODER, (self.need(layer - 1),), layer),)

    def score(self, signals: Signals) -> Tensor:
        self.seen.append(signals)
        return signals.stack(self.need)[-1]


def close(value: Tensor, expected: Tensor, within: float = 1e-5) -> bool:
    return value.shape == expected.shape and bool(((value - expected).abs() < within).all())


# -- the tower -----------------------------------------------------------------------------------


def expected(family: str, kind: str) -> list[dict[Any, Tensor]]:
    """Returns per item the tokens and quantities that a strategy should see."""
    items: list[dict[Any, Tensor]] = []
    for name in modalities(family, kind):
        weights = mapping(family, kind, name)
        with torch.no_grad():
            every: dict[Any, Tensor] = {"tokens": flat(encode(family, kind, name))}
        for need, value in patches(family, kind, name).items():
            every[need] = torch.tensordot(weights, value, 1)
        free = (weights.sum(1) > 0).split(lengths(family, kind, name))
        pieces = {what: value.split([len(f) for f in free]) for what, value in every.items()}
        items += [{what: x[i][f] for what, x in pieces.items()} for i, f in enumerate(free)]
    return items


def check(family: str, kind: str, attention: str = "sdpa") -> None:
    """Holds everything that a strategy receives of the tower against the eager copy."""
    model, spy = model_of(family, attention)[0], Spy(wanted=wanted(family))
    with vtprune.wrap(model, spy, keep=0.5):
        model.generate(**inputs_of(family, kind), max_new_tokens=1)
    items = expected(family, kind)
    rows = [i for signals in spy.seen if signals.item is not None for i in signals.item.tolist()]
    assert sorted(rows) == list(range(len(items)))
    for signals in spy.seen:
        assert signals.item is not None
        for row, i in enumerate(signals.item.tolist()):
            assert close(signals.tokens[row], items[i]["tokens"], within=1e-4)
            assert set(signals.values) == items[i].keys() - {"tokens"}
            for need, value in signals.values.items():
                assert close(value[row], items[i][need]), need


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_signals_equal_eager(family, kind, attention):
    check(family, kind, attention)


def check_carry(family: str, kind: str) -> None:
    """Holds the adapter's mapping of all patches to tokens against the model's derivatives."""
    adapter, inputs = find_adapter(model_of(family)[0]), inputs_of(family, kind)
    assert adapter.facts.feature_block == TOWERS[family].feature
    given = [modality for modality in adapter.modalities if modality.given(inputs)]
    assert [modality.name for modality in given] == modalities(family, kind)
    for modality in given:
        weights = mapping(family, kind, modality.name)
        carried = torch.cat(adapter.carry(modality, torch.eye(weights.shape[1]), inputs))
        none = weights.sum(1) == 0
        assert torch.equal(carried.isnan(), none[:, None].expand(carried.shape))
        assert close(carried[~none], weights[~none])
        assert close(carried[~none].sum(1), torch.ones(int((~none).sum())))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_connector_carries_as_the_adapter_says(family, kind):
    check_carry(family, kind)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_noise_on_a_patch_changes_its_tokens(family, kind):
    for name in modalities(family, kind):
        weights = mapping(family, kind, name)
        seeded = torch.Generator().manual_seed(0)
        for patch in torch.randperm(weights.shape[1], generator=seeded)[:12].tolist():
            assert torch.equal(touched(family, kind, name, patch), weights[:, patch] > 0), patch


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if "qwen" in case[0]])
def test_one_call_for_all_images_is_read_per_image(family, kind):
    """FlashAttention is called once, with every image and frame in one sequence."""
    adapter, inputs = find_adapter(model_of(family, "eager")[0]), inputs_of(family, kind)
    layer = TOWERS[family].readable[-1]
    for modality in adapter.modalities:
        if not modality.given(inputs):
            continue
        module = adapter.attention(modality, layer)
        with torch.no_grad(), recording([module]) as calls:
            encode(family, kind, modality.name)
        q, k = (torch.cat([call[i] for call in calls[module]], dim=2) for i in (0, 1))
        need = Received(layer)
        reader = tap.Tap({module: [need]}, 0, adapter.segments(modality, inputs))
        reader.read(module, q, k, None, None)
        assert close(reader.value(need), patches(family, kind, modality.name)[need])


# -- the language model --------------------------------------------------------------------------


def check_inside(
    family: str, kind: str, layer: int, need: type[DecoderNeed] = LastRow, attention: str = "sdpa"
) -> None:
    """Holds what a stage before ``layer`` reads of the layer before against the eager copy."""
    model, inputs = model_of(family, attention)[0], inputs_of(family, kind)
    strategy = Watched(layers=(layer,), need=need)
    with vtprune.wrap(model, strategy, keep=0.4) as handle:
        model(**inputs)
        assert handle.index is not None
        left = [row[row >= 0].tolist() for row in handle.index]
    valid, visual = inputs["attention_mask"].bool(), placeholders(family, kind)
    seen = iter(in_order(strategy.seen))
    full = INSIDE[need](family, kind, visual)
    for b, row in enumerate(full[layer - 1]):
        places, text = visual[b].nonzero()[:, 0], (valid[b] & ~visual[b]).nonzero()[:, 0]
        if len(places):
            assert close(next(seen), row[places])
        kept = places[row[places].topk(round(0.4 * len(places))).indices]
        assert left[b] == torch.cat([text, kept]).sort().values.tolist()


def in_order(seen: list[Signals]) -> list[Tensor]:
    """Returns what was received per sample that has visual tokens."""
    rows: dict[int, Tensor] = {}
    for signals in seen:
        assert signals.item is not None and len(signals.values) == 1
        (value,) = signals.values.values()
        rows |= dict(zip(signals.item.tolist(), value, strict=True))
    return [rows[i] for i in sorted(rows)]


def placeholders(family: str, kind: str) -> Tensor:
    """Marks visual tokens in the prompts, ``[B, L]`` bool."""
    config = model_of(family)[0].config
    ids = [config.image_token_id, getattr(config, "video_token_id", None) or -1]
    return torch.isin(inputs_of(family, kind)["input_ids"], torch.tensor(ids))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_fastv_keeps_what_the_last_row_looks_at(family, kind):
    facts = find_adapter(model_of(family)[0]).facts
    for layer in range(facts.first_stage, facts.decoder_layers):
        check_inside(family, kind, layer)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("need", [need for need in INSIDE if need is not LastRow])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_read_inside_equals_eager(family, kind, need, attention):
    facts = find_adapter(model_of(family)[0]).facts
    for layer in range(facts.first_stage, facts.decoder_layers):
        check_inside(family, kind, layer, need, attention)
