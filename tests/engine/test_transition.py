"""How much a layer changes tokens: by hand, and in samples of different lengths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vtprune
from tests import tiny
from tests.kernels.kernel_inputs import normal
from vtprune.engine.transition import transition, watch
from vtprune.errors import UnsupportedError
from vtprune.types import Transition


def test_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]])
    y = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-3.0, -4.0]]])  # cosines 1, 0, -1
    valid = torch.ones(1, 3, dtype=torch.bool)
    weights = [1.0, math.e, math.e**2]
    wanted = [[2.0 * weights[0], 0.5 * weights[1], weights[2]]]
    torch.testing.assert_close(transition(x, y, valid), torch.tensor(wanted) / sum(weights))
    weights[2] = 1.0
    wanted = [[2.0, 0.5 * math.e, 1.0]]
    found = transition(x, y, valid, abs_cos=True)
    torch.testing.assert_close(found, torch.tensor(wanted) / sum(weights))


def test_padding_counts_for_nothing_and_rows_do_not_meet():
    x, y = normal(2, 6, 8), normal(2, 6, 8, seed=1)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    found = transition(x, y, valid)
    torch.testing.assert_close(found[1, 2:], transition(x[1:, 2:], y[1:, 2:], valid[:1, 2:])[0])
    torch.testing.assert_close(found[:1], transition(x[:1], y[:1], valid[:1]))
    assert found[1, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_32(dtype):
    x, y = normal(1, 5, 8, dtype=dtype) * 200, normal(1, 5, 8, seed=1, dtype=dtype)
    valid = torch.ones(1, 5, dtype=torch.bool)
    found = transition(x, y, valid)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, transition(x.float(), y.float(), valid))


def test_a_layer_without_mlp_is_refused():
    layer = nn.Module()
    layer.self_attn = nn.Identity()
    with pytest.raises(UnsupportedError, match="Module has no mlp, whose input and output"):
        list(watch(layer, Transition(2), lambda: None))


def test_a_sample_in_a_padded_batch_is_decided_as_alone():
    """After the first stage too, where rows are padded by how much has left."""
    model = tiny.build()
    prompts = [tiny.prompt(2, 6, 1, seed=2), tiny.prompt(4, 3, 2, seed=3)]
    together = tiny.batch(*prompts)
    with vtprune.wrap(model, "transprune", keep=0.55, layers=(1, 2, 3)) as handle:
        model(**together)
        assert handle.index is not None and handle._decoding is not None
        read, left = dict(handle._decoding.rows), handle.index
        for b, pixels in ((0, together["pixel_values"][:1]), (1, together["pixel_values"][1:])):
            alone = {**tiny.batch(prompts[b]), "pixel_values": pixels}
            model(**alone)
            pad = together["input_ids"].shape[1] - len(prompts[b])
            for need, value in handle._decoding.rows.items():
                torch.testing.assert_close(read[need][b, pad:], value[0])
            kept = left[b][left[b] >= 0] - pad
            assert handle.index[0].tolist() == kept.tolist()
