"""HoloV: exact counts in raster order, and the official order with its zero vectors."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_oracles import assert_masks_only
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import ClsRow, Received, Signals

# Two crops of 4 tokens; the first is worth nine times the second.
ATTENTION = torch.tensor([[0.2, 0.4, 0.1, 0.2, 0.03, 0.01, 0.04, 0.02]])


def signals(attention: torch.Tensor = ATTENTION) -> Signals:
    tokens = torch.eye(8)[None].expand(len(attention), 8, 8)  # no two alike: no variance
    return Signals(tokens, values={ClsRow(22): attention})


def test_the_best_of_each_crop_stay_in_raster_order() -> None:
    kept = vtprune.select("holov", keep=4, signals=signals(), crops=2)
    # 3.6 and 0.4: 3 + 1 for the first, all of it
    assert kept.rows.tolist() == [[0, 1, 2, 3]]
    kept = vtprune.select("holov", keep=3, signals=signals(), crops=2)
    assert kept.rows.tolist() == [[0, 1, 3]]


def test_what_has_no_room_goes_to_the_other_crop() -> None:
    kept = vtprune.select("holov", keep=6, signals=signals(), crops=2)
    assert kept.rows.tolist() == [[0, 1, 2, 3, 4, 6]]
    assert kept.mix is None


def test_the_official_form_pads_with_zero_vectors() -> None:
    kept = vtprune.select("holov", keep=6, signals=signals(), crops=2, compat=True)
    # 5.4 and 0.6: 5 + 1 for the first, which has 4, in raster order as a whole crop
    assert kept.rows.tolist() == [[0, 1, 2, 3, -1, -1]]
    out = kept.apply(signals().tokens)
    assert torch.equal(out[0, :4], torch.eye(8)[:4])
    assert torch.equal(out[0, 4:], torch.zeros(2, 8))


def test_the_official_order_is_by_attention_inside_a_crop() -> None:
    even = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.3, 0.2]])
    kept = vtprune.select("holov", keep=4, signals=signals(even), crops=2, compat=True)
    assert kept.rows.tolist() == [[1, 2, 6, 7]]
    kept = vtprune.select("holov", keep=6, signals=signals(even), crops=2, compat=True)
    assert kept.rows.tolist() == [[1, 2, 0, 6, 7, 4]]


def test_images_of_a_batch_pad_for_themselves() -> None:
    both = torch.cat([ATTENTION, ATTENTION.flip(1), torch.full((1, 8), 0.125)])
    kept = vtprune.select("holov", keep=6, signals=signals(both), crops=2, compat=True)
    assert kept.rows.tolist() == [[0, 1, 2, 3, -1, -1], [4, 5, 6, 7, -1, -1], [0, 1, 2, 4, 5, 6]]


def test_attention_received_takes_the_place_of_cls() -> None:
    given = signals()
    given.values = {Received(22): ATTENTION}
    assert vtprune.select("holov", keep=3, signals=given, crops=2).rows.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crops": 0}, "crops=0 must be a count"),
        ({"crops": 2.0}, r"crops=2\.0 must be a count"),
        ({"alpha": -1.0}, r"alpha=-1\.0 must be a weight"),
    ],
)
def test_values_out_of_range(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("holov", **option)


def test_the_official_order_reaches_the_language_model() -> None:
    strategy = build("holov", crops=4, compat=True)
    assert_masks_only(tiny.build(), tiny.ragged(), strategy, "renumber")
