"""Half precision and mixed layouts: exact at keep = all, finite scores, repeatable choices."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vtprune
from tests.families.batches import Batch, batch, converted, new_ids
from vtprune.engine import signals
from vtprune.eval import tiny
from vtprune.types import Signals

SITES = {
    "divprune": 0.5,
    "fastervlm": 0.5,
    "visionzip": 0.5,
    "tome": 0.5,
    "fastv": 0.5,
    "pyramiddrop": 0.8,
    "transprune": 0.8,
}
# Types of everything before the language model, and of the language model.
LAYOUTS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32 before bf16": (torch.float32, torch.bfloat16),
    "bf16 before fp32": (torch.bfloat16, torch.float32),
}


@cache
def built(family: str, layout: str) -> tuple[Any, Batch]:
    """Returns model and inputs; pixels are cast as a user would."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = tiny.build(family)
    before, language = LAYOUTS[layout]
    model.to(before)
    model.get_decoder().to(language)
    model.lm_head.to(language)
    return model, converted(batch(processor, "ragged"), before)


def run_or_skip(model: Any, inputs: Batch) -> torch.Tensor:
    try:
        return model(**inputs).logits
    except RuntimeError as error:
        pytest.skip(f"transformers does not run this layout: {error}")


def cases() -> Any:
    """Parametrizes over strategies and layouts; most of them are slow."""
    quick = {("fastervlm", "bf16"), ("pyramiddrop", "bf16"), ("divprune", "fp32 before bf16")}
    every = [(strategy, layout) for layout in LAYOUTS for strategy in SITES]
    marks = [() if case in quick else pytest.mark.slow for case in every]
    listed = [pytest.param(*case, marks=m) for case, m in zip(every, marks, strict=True)]
    return pytest.mark.parametrize(("strategy", "layout"), listed)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Signals]:
    """What strategies were shown."""
    shown, inner = [], signals.select_group

    def watched(strategy: Any, given: Signals, k: int) -> Any:
        shown.append(given)
        return inner(strategy, given, k)

    monkeypatch.setattr(signals, "select_group", watched)
    return shown


@cases()
@pytest.mark.parametrize("family", tiny.names())
@torch.no_grad()
def test_every_layout(family: str, strategy: str, layout: str, seen: list[Signals]) -> None:
    model, inputs = built(family, layout)
    logits = run_or_skip(model, inputs)
    ids = new_ids(model, inputs, 2)
    with vtprune.wrap(model, strategy, keep=1.0):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(new_ids(model, inputs, 2), ids)
    with vtprune.wrap(model, strategy, keep=SITES[strategy]) as handle:
        new_ids(model, inputs, 2)
        first, stages = [s.rows for s in handle.selections], handle.report().stages
        out = model(**inputs)
        again = [s.rows for s in handle.selections]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert handle.report().stages == stages
        assert stages or all(s.rows.shape[1] < s.n for s in handle.selections)
    assert handle.index is not None
    assert out.logits.dtype == logits.dtype
    assert out.logits[handle.index >= 0].isfinite().all()
    values = [pair for given in seen for pair in given.values.items()]
    assert bool(values) == (strategy != "divprune")
    for need, value in values:
        assert value.dtype == torch.float32 and value.isfinite().all(), need
