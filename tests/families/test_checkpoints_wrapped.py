"""A local checkpoint, loaded as users do, wrapped in one line, generates in every way offered."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import vtprune
from tests.engine.test_generation import OLD
from tests.families import prompts
from tests.families.batches import Batch, batch, decoded, new_ids, of

Pair = tuple[Any, Any]
SITES: dict[str, tuple[Any, Any]] = {
    "projector": ("divprune", 0.5),
    "signal": ("fastervlm", 0.5),
    "tower": ("visionzip", 0.5),
    "decoder": ("fastv", 0.5),
    "stages": ("pyramiddrop", 0.8),
    "both": (["divprune", "fastv"], [0.7, 0.5]),
}
INSIDE = {"decoder", "stages", "both"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def sites(*quick: str) -> Any:
    """Parametrizes over the sites; all but those named are slow."""
    cases = [s if s in quick else pytest.param(s, marks=pytest.mark.slow) for s in SITES]
    return pytest.mark.parametrize("site", cases)


def refused_when_old() -> Any:
    """Several sequences of a prompt with several images: what old transformers mixes up."""
    if not OLD:
        return nullcontext()
    return pytest.raises(vtprune.UnsupportedError, match="mixes up the images")


def wrapped(pair: Pair, site: str) -> vtprune.Handle:
    strategy, keep = SITES[site]
    return vtprune.wrap(pair[0], strategy, keep=keep)


def alone(processor: Any, kind: str, row: int) -> Batch:
    return of(processor, prompts._KINDS[kind](0)[row])


@sites("signal")
def test_every_kind_generates_behind_its_prompt(family: str, loaded: Pair, site: str) -> None:
    model, processor = loaded
    for kind in prompts.kinds(family):
        inputs = batch(processor, kind)
        with wrapped(loaded, site) as handle:
            ids = new_ids(model, inputs)
            report = handle.report()
        visual = torch.isin(inputs["input_ids"], _placeholders(handle)).sum(1)
        tokens = [report.of_sample(b)[0] for b in range(len(visual))]
        assert tokens == visual.tolist(), kind
        assert ids.shape == (len(visual), 5)
        assert len(handle.selections) == len(report.images)
        for image, selection in zip(report.images, handle.selections, strict=True):
            assert selection.n == image.tokens
            assert selection.rows.shape == (1, image.kept)
        if site not in INSIDE or site == "both":
            assert all(image.kept < image.tokens for image in report.images), kind
        if site in INSIDE:
            assert {stage.sample for stage in report.stages} == {i.sample for i in report.images}
            assert any(stage.kept < stage.tokens for stage in report.stages)


def _placeholders(handle: vtprune.Handle) -> torch.Tensor:
    return torch.tensor([modality.placeholder for modality in handle.adapter.modalities])


@sites()
def test_keep_all_is_the_unwrapped_model(family: str, loaded: Pair, site: str) -> None:
    model, processor = loaded
    strategy, keep = SITES[site]
    inputs = batch(processor, "ragged")
    plain, logits = new_ids(model, inputs), model(**inputs).logits
    with vtprune.wrap(model, strategy, keep=[1.0, 1.0] if isinstance(keep, list) else 1.0):
        assert torch.equal(new_ids(model, inputs), plain)
        assert torch.equal(model(**inputs).logits, logits)


@sites("decoder")
def test_a_row_of_the_batch_equals_the_row_alone(loaded: Pair, site: str) -> None:
    model, processor = loaded
    inputs = batch(processor, "ragged")
    with wrapped(loaded, site), refused_when_old():
        together = new_ids(model, inputs, num_beams=2)
        for row in range(2):
            single = new_ids(model, alone(processor, "ragged", row), num_beams=2)
            assert torch.equal(together[row], single[0]), row


@sites("projector")
def test_two_sequences_of_each_prompt(loaded: Pair, site: str) -> None:
    model, processor = loaded
    inputs = batch(processor, "ragged")
    with wrapped(loaded, site):
        greedy = new_ids(model, inputs)
        with refused_when_old():
            twice = new_ids(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
            assert torch.equal(twice, greedy.repeat_interleave(2, dim=0))


@sites("decoder", "both")
def test_a_decode_loop_equals_generate(family: str, loaded: Pair, site: str) -> None:
    model, processor = loaded
    for kind in prompts.kinds(family):
        inputs = batch(processor, kind)
        with torch.no_grad(), wrapped(loaded, site):
            wanted = new_ids(model, inputs)
            assert torch.equal(decoded(model, inputs), wanted), kind
            if kind == "one":
                assert torch.equal(decoded(model, inputs, given=2), wanted)


@sites("both")
def test_a_static_cache_changes_nothing(family: str, loaded: Pair, site: str) -> None:
    model, processor = loaded
    inputs = batch(processor, "ragged")
    with wrapped(loaded, site):
        wanted = new_ids(model, inputs)
        if family == "gemma3" and site in INSIDE:
            with pytest.raises(vtprune.UnsupportedError, match="a static cache"):
                new_ids(model, inputs, cache_implementation="static", disable_compile=True)
            return
        static = new_ids(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, wanted)


@sites()
def test_sampling_repeats_with_its_seed(loaded: Pair, site: str) -> None:
    model, processor = loaded
    inputs = batch(processor, "one")
    drawn = []
    with wrapped(loaded, site):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            drawn.append(new_ids(model, inputs, 8, do_sample=True, top_k=20))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@sites()
def test_a_second_call_knows_nothing_of_the_first(family: str, loaded: Pair, site: str) -> None:
    model, processor = loaded
    batches = [batch(processor, kind) for kind in prompts.kinds(family)]
    with wrapped(loaded, site) as handle:
        fresh = [new_ids(model, inputs, 3) for inputs in batches]
        for inputs, ids in zip(reversed(batches), reversed(fresh), strict=True):
            model(**inputs)
            assert torch.equal(new_ids(model, inputs, 3), ids)
            assert handle.index is not None
