"""Faults that the oracle matrix must notice, each in the families that it concerns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import test_matrix
from tests.families.prompts import VIDEOS
from tests.families.test_flowcut import SIZES
from vtprune import selection
from vtprune.engine import compaction, cuts, encoder, wrap
from vtprune.eval import tiny
from vtprune.vlm_adapters._base import VLMAdapter

MROPE = [family for family in tiny.names() if "qwen" in family]
TILED = test_matrix.NEWLINES


def goes_red(family: str, kind: str, site: str, patch: Any, *fault: Any) -> None:
    """Holds that the check is green, and red with the fault ``(where, name, replacement)``."""
    test_matrix.check(family, kind, site)
    patch.setattr(*fault)
    with pytest.raises(AssertionError):
        test_matrix.check(family, kind, site)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("family", MROPE)
def test_a_wrong_axis_of_positions(family, axis, monkeypatch):
    right = compaction.gather_positions

    def wrong(positions, index, policy):
        out = right(positions, index, policy).clone()
        out[axis] += index % 3
        return out

    goes_red(family, "ragged", "projector", monkeypatch, compaction, "gather_positions", wrong)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_planes_that_do_not_follow(family, monkeypatch):
    right = VLMAdapter.pack

    def wrong(self, output, items, planes):
        firsts = [[x.roll(1, 0) for x in plane] for plane in planes]
        return right(self, output, items, firsts)

    goes_red(family, "ragged", "projector", monkeypatch, VLMAdapter, "pack", wrong)


@pytest.mark.parametrize("family", TILED)
def test_newlines_out_of_place(family, monkeypatch):
    right = encoder.stand

    def wrong(item, chosen, tokens, policy):
        selection, out = right(item, chosen, tokens, policy)
        return selection, out.roll(1, 0) if len(item.fixed) else out

    goes_red(family, "one", "projector", monkeypatch, encoder, "stand", wrong)


@pytest.mark.parametrize("family", VIDEOS)
def test_videos_and_images_mixed_up(family, monkeypatch):
    right = wrap.encode

    def wrong(*args):
        encoded = right(*args)
        for output in encoded.outputs.values():
            features = output.pooler_output
            flipped = [x.flip(0) for x in features]
            is_tensor = isinstance(features, torch.Tensor)
            output.pooler_output = features.flip(0, 1) if is_tensor else flipped
        return encoded

    goes_red(family, "video_and_image", "projector", monkeypatch, wrap, "encode", wrong)


@pytest.mark.parametrize("family", tiny.names())
def test_dropped_columns_that_stay_visible_while_decoding(family, monkeypatch):
    right = cuts.Cut.step

    def wrong(self, kwargs, layer, rotary):
        cut = right(self, kwargs, layer, rotary)
        mask = cut["attention_mask"]
        return cut if mask is None else {**cut, "attention_mask": torch.zeros_like(mask) == 0}

    # A row without an image is the shorter one, by far, after any cut.
    goes_red(family, "mixed", "decoder", monkeypatch, cuts.Cut, "step", wrong)


@pytest.mark.parametrize("family", tiny.names())
def test_rotary_embeddings_of_other_tokens(family, monkeypatch):
    right = cuts._rows

    def wrong(embeddings, index):
        return right(embeddings, index.flip(1))

    goes_red(family, "ragged", "decoder", monkeypatch, cuts, "_rows", wrong)


@pytest.mark.parametrize("family", SIZES)
def test_a_stage_behind_the_tower_that_sees_other_positions(family, monkeypatch):
    right = cuts.Cut._embeddings

    def wrong(self, kwargs, hidden, rotary):
        cos, sin = right(self, kwargs, hidden, rotary)
        return cos.roll(1, 1), sin.roll(1, 1)

    goes_red(family, "ragged", "tower stages", monkeypatch, cuts.Cut, "_embeddings", wrong)


@pytest.mark.parametrize("family", SIZES)
def test_a_stage_behind_the_tower_that_keeps_others_than_it_says(family, monkeypatch):
    right = cuts.Cut.gather

    def wrong(self, hidden, before):
        return right(self, hidden.roll(1, 1), before)

    goes_red(family, "ragged", "tower stages", monkeypatch, cuts.Cut, "gather", wrong)


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next", "qwen2_5_vl"])
def test_merging_without_weights(family, monkeypatch):
    right = selection.segment_merge

    def wrong(x, source, target, weight, n_segments):
        return right(x, source, target, torch.ones_like(weight), n_segments)

    goes_red(family, "ragged", "tower", monkeypatch, selection, "segment_merge", wrong)
