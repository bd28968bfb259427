"""What cannot be right is refused, and budgets are kept to the token, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.families import prompts
from tests.families.batches import Batch, batch, new_ids
from vtprune.eval import tiny

Pair = tuple[Any, Any]
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
# Tokens before the first row of a (90, 120) image, rows, tokens in a row: worked out by hand.
# LLaVA-NeXT: 16 of the base view; 2 x 2 tiles of 4 x 4, the image fills 56 x 42 of their pixels.
# OneVision: 25 of the base view; 3 x 4 tiles of 5 x 5 are 15 x 20, shrunk to the area of 9 tiles.
LAYOUTS = {
    "llava_next": (16, 6, 8),
    "llava_next_video": (16, 6, 8),
    "llava_onevision": (25, 12, 17),
}


def refused(error: type[Exception], match: str) -> Any:
    return pytest.raises(error, match=match)


def placeholders(handle: vtprune.Handle) -> torch.Tensor:
    return torch.tensor([modality.placeholder for modality in handle.adapter.modalities])


# -- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", QWEN)
def test_three_axes_are_not_renumbered(family: str) -> None:
    model, _ = tiny.build(family)
    with refused(vtprune.UnsupportedError, "renumber.*time, height and width.*Leave positions out"):
        vtprune.wrap(model, "divprune", keep=9, positions="renumber")
    with vtprune.wrap(model, "pyramiddrop", keep=0.8) as handle:  # its authors renumber
        assert {step.positions for step in handle.steps} == {"keep"}


def test_a_windowed_block_gives_no_signal() -> None:
    model, _ = tiny.build("qwen2_5_vl")
    with refused(vtprune.ConfigError, r"layers=\(0,\).*\[1, 3\].*whole image"):
        vtprune.wrap(model, "fastervlm", keep=9, layers=(0,))
    vtprune.wrap(model, "fastervlm", keep=9, layers=(1,)).remove()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_no_stage_below_the_deepstack_planes(family: str) -> None:
    model, _ = tiny.build(family)
    for strategy in ("fastv", "pyramiddrop"):
        with refused(vtprune.ConfigError, r"layers=\(2,\).*decoder layers 3 to 5"):
            vtprune.wrap(model, strategy, keep=0.9, layers=(2,))
    vtprune.wrap(model, "fastv", keep=9, layers=(3,)).remove()


def test_a_sliding_window_shorter_than_the_prompt() -> None:
    model, processor = tiny.build("gemma3", sliding_window=16)
    inputs = batch(processor, "one")
    with vtprune.wrap(model, "fastv", keep=4, layers=(1,)):
        for call in (model, model.generate):
            with refused(vtprune.UnsupportedError, "sliding window.*more than 16.*'divprune'"):
                call(**inputs)
        with refused(vtprune.UnsupportedError, "sliding window"):
            model.generate(**inputs, cache_implementation="static", disable_compile=True)
    plain = new_ids(model, inputs)
    with vtprune.wrap(model, "divprune", keep=1.0):
        assert torch.equal(new_ids(model, inputs), plain)
    with vtprune.wrap(model, "divprune", keep=4):
        assert new_ids(model, inputs).shape == (1, 5)


def test_a_window_that_fills_while_decoding_is_refused() -> None:
    model, processor = tiny.build("gemma3", sliding_window=24)
    inputs = batch(processor, "one")
    assert inputs["input_ids"].shape[1] == 22
    with vtprune.wrap(model, "fastv", keep=4, layers=(1,)):
        new_ids(model, inputs, 2)
        with refused(vtprune.UnsupportedError, "sliding window"):
            new_ids(model, inputs, 6)


# -- newlines ------------------------------------------------------------------------------------


def test_rows_need_newlines(family: str, built: Pair) -> None:
    model, _ = built
    if family in LAYOUTS:
        vtprune.wrap(model, "divprune", keep=9, newlines="row").remove()
        return
    with refused(vtprune.ConfigError, "newlines='row'.*no tokens that end a row"):
        vtprune.wrap(model, "divprune", keep=9, newlines="row")


@pytest.mark.parametrize("strategy", ["random", "fastervlm", "divprune"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_newline_stays_with_its_row(family: str, strategy: str) -> None:
    model, processor = tiny.build(family)
    before, rows, width = LAYOUTS[family]
    total = before + rows * (width + 1)
    ends = [before + width + i * (width + 1) for i in range(rows)]
    inputs = batch(processor, "one")
    for keep in (1.0, 40, 7, 2):
        for policy in ("row", "keep"):
            with vtprune.wrap(model, strategy, keep=keep, newlines=policy) as handle:
                new_ids(model, inputs, 1)
            (selection,) = handle.selections
            assert selection.n == total
            kept = selection.rows[0].tolist()
            assert kept == sorted(kept)
            tokens = [i for i in kept if i not in ends]
            assert len(tokens) == (total - rows if keep == 1.0 else keep)
            busy = {(i - before) // (width + 1) for i in tokens if i >= before}
            stays = ends if policy == "keep" else [ends[row] for row in sorted(busy)]
            assert [i for i in kept if i in ends] == stays
            if policy == "row" and keep == 2:
                assert len(stays) < rows, "some row is empty"


# -- inputs --------------------------------------------------------------------------------------


def without_pixels(handle: vtprune.Handle, inputs: Batch) -> Batch:
    pixels = {name for m in handle.adapter.modalities for name in m.pixels}
    return {name: value for name, value in inputs.items() if name not in pixels}


def test_placeholders_without_pixels(family: str, built: Pair) -> None:
    model, processor = built
    for kind in prompts.kinds(family):
        inputs = batch(processor, kind)
        with vtprune.wrap(model, "strided", keep=0.5) as handle:
            bare = without_pixels(handle, inputs)
            for call in (model, model.generate):
                with refused(vtprune.InputError, r"placeholders \(id \d+\), but no pixel_values"):
                    call(**bare)


def test_a_wrong_number_of_placeholders(family: str, built: Pair) -> None:
    model, processor = built
    for kind in ("ragged", "video"):
        if kind not in prompts.kinds(family):
            continue
        inputs = batch(processor, kind)
        with vtprune.wrap(model, "strided", keep=0.5) as handle:
            row, column = torch.isin(inputs["input_ids"], placeholders(handle)).nonzero()[0]
            word = inputs["input_ids"][0, -1]
            inputs["input_ids"] = inputs["input_ids"].index_put((row, column), word)
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"][row, column] = 0
            for call in (model, model.generate):
                with refused(vtprune.InputError, r"prompts hold \d+ .* placeholders.*processor"):
                    call(**inputs)


@pytest.mark.parametrize("strategy", ["fastervlm", "fastv", "visionzip", "pyramiddrop"])
def test_text_alone_passes_untouched(built: Pair, strategy: str) -> None:
    model, processor = built
    questions = ["How many?", "Which colour has the large ball?"]
    text = dict(processor.tokenizer(questions, padding=True, return_tensors="pt"))
    plain, logits = new_ids(model, text), model(**text).logits
    with vtprune.wrap(model, strategy, keep=0.8) as handle:
        assert torch.equal(new_ids(model, text), plain)
        assert torch.equal(model(**text).logits, logits)
        assert handle.report().images == () and handle.selections == []


# -- budgets -------------------------------------------------------------------------------------


def test_counts_are_exact(family: str, built: Pair) -> None:
    model, processor = built
    for kind in prompts.kinds(family):
        inputs = batch(processor, kind)
        for strategy in ("divprune", "fastervlm"):
            with vtprune.wrap(model, strategy, keep=5) as handle:
                model(**inputs)
            for item, selection in zip(handle._items, handle.selections, strict=True):
                chosen = torch.isin(selection.rows[0], item.free)
                assert int(chosen.sum()) == min(5, len(item.free)), (kind, strategy)
                assert selection.rows[0].unique().numel() == selection.rows.shape[1]
                assert int((~chosen).sum()) == len(item.fixed)
        with vtprune.wrap(model, "fastv", keep=5) as handle:
            model(**inputs)
            assert [stage.kept for stage in handle.report().stages] == [5] * len(
                {image.sample for image in handle.report().images}
            )


def test_more_than_there_is(built: Pair) -> None:
    model, processor = built
    with vtprune.wrap(model, "strided", keep=0.5) as handle:
        n = handle.adapter.facts.n_tokens
    if n is not None:
        with refused(vtprune.ConfigError, rf"keep={n + 1}, but an image has {n} tokens.*at most"):
            vtprune.wrap(model, "divprune", keep=n + 1)
        vtprune.wrap(model, "divprune", keep=n).remove()
        return
    inputs = batch(processor, "one")
    plain = new_ids(model, inputs)
    with vtprune.wrap(model, "divprune", keep=10_000) as handle:
        assert torch.equal(new_ids(model, inputs), plain)
        report = handle.report()
    assert all(image.short and image.kept == image.tokens for image in report.images)
    assert "fewer than asked for" in str(report)
