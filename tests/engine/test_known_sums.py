"""What attention computes anyway is used where attention received is read, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_signals import check
from tests.probes import Spy
from vtprune.engine import reduction, tap
from vtprune.types import Received


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The log-sum-exp of each reading so far."""
    right, seen = reduction.attn_received, []

    def received(*args: Any, lse: Tensor | None, **how: Any) -> Tensor:
        seen.append(lse)
        return right(*args, lse=lse, **how)

    monkeypatch.setattr(reduction, "attn_received", received)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_second_pass_alone_runs_where_attention_says_its_sums(attention, known):
    check("clip", attention)
    assert len(known) == 3
    assert all((lse is None) == (attention == "eager") for lse in known)


def test_the_model_is_the_same_bit_for_bit(known):
    model, inputs = tiny.build("siglip"), tiny.ragged()
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.wrap(model, Spy(wanted=(Received(1),)), keep=tiny.N):
            got = model(**inputs).logits
    assert torch.equal(got, want)
    assert known and known[0] is not None


def test_wrong_sums_are_noticed(monkeypatch):
    right = tap.attention_with_lse

    def wrong(*args: Any) -> Any:
        out, lse = right(*args)
        return out, None if lse is None else lse + 0.01

    monkeypatch.setattr(tap, "attention_with_lse", wrong)
    with pytest.raises(AssertionError):
        check("siglip")
