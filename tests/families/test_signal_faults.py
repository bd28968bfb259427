"""Faults of an adapter or of the tap must turn oracle 3 red."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import prompts
from tests.families.eager import TOWERS, mapping, model_of
from tests.families.test_signals import FAMILIES, check, check_carry, check_inside
from vtprune.engine import layers, rows, tap, transition
from vtprune.engine.plan import find_adapter
from vtprune.types import LastFlow, LastRow, TextRows, Transition, VisualRows
from vtprune.vlm_adapters._base import VLMAdapter
from vtprune.vlm_adapters._qwen import QwenVL
from vtprune.vlm_adapters.qwen2_5_vl import Qwen2_5VL

WITH_CLS = [family for family in FAMILIES if TOWERS[family].n_prefix]
WITH_VIDEO = [family for family in FAMILIES if "video" in prompts.kinds(family)]
# These show videos to the model as images.
OF_IMAGES = ("internvl", "smolvlm")
# Several patches are stacked into one token.
MERGING = ["idefics3", "internvl", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm"]


@pytest.fixture
def adapter_class(family: str) -> type[VLMAdapter]:
    return type(find_adapter(model_of(family)[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_one_layer_off_is_noticed(family, adapter_class, monkeypatch):
    right = adapter_class.attention

    def off(self: VLMAdapter, modality: Any, layer: int) -> Any:
        return right(self, modality, layer - 1 if layer == TOWERS[family].readable[-1] else layer)

    monkeypatch.setattr(adapter_class, "attention", off)
    with pytest.raises(AssertionError):
        check(family, "ragged")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_in_the_place_of_the_next_is_noticed(family, adapter_class, monkeypatch):
    right = adapter_class.carry
    monkeypatch.setattr(
        adapter_class,
        "carry",
        lambda self, modality, patches, batch: right(self, modality, patches.roll(1, 0), batch),
    )
    with pytest.raises(AssertionError):
        check(family, "ragged")
    with pytest.raises(AssertionError):
        check_carry(family, "ragged")


@pytest.mark.parametrize("family", MERGING)
def test_patches_that_change_groups_are_noticed(family, adapter_class, monkeypatch):
    right = adapter_class.carry

    def swapped(self: VLMAdapter, modality: Any, patches: Tensor, batch: Any) -> list[Tensor]:
        first, second = mapping(family, "ragged", "image")[:2]
        a, b = int(first.nonzero()[-1]), int(second.nonzero()[0])
        order = torch.arange(len(patches))
        order[[a, b]] = order[[b, a]]
        return right(self, modality, patches[order], batch)

    monkeypatch.setattr(adapter_class, "carry", swapped)
    with pytest.raises(AssertionError):
        check(family, "ragged")


@pytest.mark.parametrize("kind", prompts.kinds("qwen2_5_vl"))
def test_window_order_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(Qwen2_5VL, "merge", QwenVL.merge)
    with pytest.raises(AssertionError):
        check("qwen2_5_vl", kind)
    with pytest.raises(AssertionError):
        check_carry("qwen2_5_vl", kind)


@pytest.mark.parametrize("family", WITH_CLS)
def test_a_kept_cls_is_noticed(family, monkeypatch):
    right = tap.Tap._reduce

    def shifted(self: tap.Tap, *args: Any) -> Tensor:
        self.n_prefix = 0
        value = right(self, *args)[:, :-1]
        self.n_prefix = 1
        return value

    monkeypatch.setattr(tap.Tap, "_reduce", shifted)
    with pytest.raises(AssertionError):
        check(family, "ragged")


def test_images_in_one_segment_are_noticed(monkeypatch):
    monkeypatch.setattr(tap.Tap, "_parts", lambda self, q, k, v, mask: [(q, k, v)])
    check("mistral3", "one")
    with pytest.raises(AssertionError):
        check("mistral3", "ragged")


@pytest.mark.parametrize("family", [f for f in WITH_VIDEO if f not in OF_IMAGES])
def test_videos_before_images_are_noticed(family, adapter_class, monkeypatch):
    right = adapter_class.modalities.fget
    monkeypatch.setattr(adapter_class, "modalities", property(lambda self: right(self)[::-1]))
    with pytest.raises(AssertionError):
        check(family, "video_and_image")


@pytest.mark.parametrize("need", [LastRow, LastFlow, TextRows, VisualRows])
@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_key_heads_are_noticed(family, need, monkeypatch):
    right = rows.attn_rows
    monkeypatch.setattr(rows, "attn_rows", lambda q, k, **how: right(q, k.flip(1), **how))
    with pytest.raises(AssertionError):
        check_inside(family, "ragged", 3, need)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_padding_is_noticed(family, monkeypatch):
    right = rows.Rows.__init__

    def wrong(self: rows.Rows, module: Any, valid: Tensor, visual: Tensor) -> None:
        right(self, module, valid | True, visual)

    def causal(self: rows.Rows, b: int, asking: Tensor, spots: Tensor) -> Tensor:
        return spots <= asking[:, None]

    monkeypatch.setattr(rows.Rows, "__init__", wrong)
    check_inside(family, "ragged", 3)  # the model's own mask hides it all the same
    monkeypatch.setattr(rows.Rows, "_seen", causal)
    with pytest.raises(AssertionError):
        check_inside(family, "ragged", 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_from_all_tokens_is_noticed(family, monkeypatch):
    right = rows.Flows.__init__

    def wrong(self: rows.Flows, module: Any, valid: Tensor, visual: Tensor) -> None:
        right(self, module, valid, valid)

    monkeypatch.setattr(rows.Flows, "__init__", wrong)
    with pytest.raises(AssertionError):
        check_inside(family, "one", 3, LastFlow)


@pytest.mark.parametrize("need", [LastRow, LastFlow, TextRows, VisualRows])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_layer_off_is_noticed(family, need, monkeypatch):
    right = layers.Layers._read

    def wrong(self: Any, decoding: Any, need: Any, *args: Any) -> Tensor:
        return right(self, decoding, replace(need, layer=need.layer - 1), *args)

    monkeypatch.setattr(layers.Layers, "_read", wrong)
    with pytest.raises(AssertionError):
        check_inside(family, "ragged", 3, need)


def goes_red(family: str, need: Any, patch: pytest.MonkeyPatch, *fault: Any) -> None:
    """Holds that what is read is right, and noticed with ``fault`` ``(where, name, wrong)``."""
    check_inside(family, "ragged", 3, need)
    patch.setattr(*fault)
    with pytest.raises(AssertionError):
        check_inside(family, "ragged", 3, need)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruction_that_begins_with_an_image_is_noticed(family, monkeypatch):
    right = rows.Texts.asking

    def wrong(self: rows.Texts, b: int) -> Tensor:
        return torch.cat([self.visual[b].nonzero()[-1:, 0], right(self, b)])

    goes_red(family, TextRows, monkeypatch, rows.Texts, "asking", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_visual_token_that_is_not_asked_is_noticed(family, monkeypatch):
    right = rows.Visuals.asking
    monkeypatch.setattr(rows.Visuals, "asking", lambda self, b: right(self, b)[:-1])
    with pytest.raises(AssertionError):
        check_inside(family, "ragged", 3, VisualRows)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_an_instruction_that_sees_what_comes_is_noticed(family, monkeypatch):
    def wrong(self: Any, b: int, asking: Tensor, spots: Tensor) -> Tensor:
        return torch.ones(len(asking), len(spots), dtype=torch.bool)

    goes_red(family, TextRows, monkeypatch, rows.Rows, "_seen", wrong)


@pytest.mark.parametrize("family", ["paligemma"])
def test_an_instruction_that_does_not_see_what_comes_is_noticed(family, monkeypatch):
    def wrong(self: Any, b: int, asking: Tensor, spots: Tensor) -> Tensor:
        return spots <= asking[:, None]

    goes_red(family, TextRows, monkeypatch, rows.Rows, "_seen", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transition_of_half_a_layer_is_noticed(family, monkeypatch):
    right = transition.transition
    seen: list[int] = []

    def wrong(x: Tensor, *args: Any, **how: Any) -> Tensor:
        seen.append(0)
        return right(x, *args, **how) * (len(seen) % 2)

    goes_red(family, Transition, monkeypatch, transition, "transition", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transition_that_shares_with_padding_is_noticed(family, monkeypatch):
    right = transition.transition

    def wrong(x: Tensor, y: Tensor, valid: Tensor, **how: Any) -> Tensor:
        return right(x, y, valid | True, **how)

    goes_red(family, Transition, monkeypatch, transition, "transition", wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transition_one_layer_off_is_noticed(family, monkeypatch):
    right = layers.watch

    def wrong(layer: Any, need: Transition, current: Any) -> Any:
        text = find_adapter(model_of(family, "sdpa")[0]).decoder
        return right(text[need.layer - 1], need, current)

    goes_red(family, Transition, monkeypatch, layers, "watch", wrong)
