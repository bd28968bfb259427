"""Salience: what is asked of a tower with and without [CLS], and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.contracts.bank import TOWERS
from vtprune.errors import InputError
from vtprune.scoring.attention import salience, salience_needs, wide, wide_needs
from vtprune.types import ClsRow, Received, Signals, WideClsRow, WideKeys

TOKENS = torch.zeros(1, 3, 2)
LOW, HIGH = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.5, 0.25, 0.0]])


def test_the_need_is_the_cls_row_where_there_is_one() -> None:
    with_cls, without = TOWERS["with CLS"], TOWERS["without CLS"]
    assert salience_needs((3, 7), with_cls) == (ClsRow(3), ClsRow(7))
    assert salience_needs((3, 7), without) == (Received(3), Received(7))
    assert wide_needs(4, with_cls) == (WideClsRow(4), WideKeys(4))
    assert wide_needs(4, replace(with_cls, has_cls=False)) == (Received(4), WideKeys(4))


@pytest.mark.parametrize("kind", [ClsRow, Received])
def test_blocks_are_summed_without_weights(kind) -> None:
    signals = Signals(TOKENS, values={kind(7): HIGH, kind(3): LOW})
    torch.testing.assert_close(salience(signals), torch.tensor([[0.6, 0.45, 0.3]]))
    torch.testing.assert_close(salience(Signals(TOKENS, values={kind(3): LOW})), LOW)


def test_one_wide_head_has_salience_and_keys() -> None:
    keys = torch.arange(12.0).view(1, 3, 4)
    for kind in (WideClsRow, Received):
        found, own = wide(Signals(TOKENS, values={kind(9): HIGH, WideKeys(9): keys}))
        assert torch.equal(found, HIGH)
        assert torch.equal(own, keys)
    with pytest.raises(InputError, match="no WideClsRow or Received"):
        wide(Signals(TOKENS, values={ClsRow(9): HIGH, WideKeys(9): keys}))
