"""A checkpoint in a directory works as its family's do: Auto classes, chat template, generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import prompts
from tests.probes import generate
from vtprune.eval import tiny

Pair = tuple[Any, Any]


def test_what_is_loaded_is_what_was_saved(built: Pair, loaded: Pair) -> None:
    for before, after in zip(built, loaded, strict=True):
        assert type(after) is type(before)
    before, after = (model.state_dict() for model, _ in (built, loaded))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_every_kind_of_batch_is_answered_alike(family: str, built: Pair, loaded: Pair) -> None:
    for kind in prompts.kinds(family):
        batches = [prompts.inputs(processor, kind) for _, processor in (built, loaded)]
        assert batches[0].keys() == batches[1].keys(), kind
        for key, value in batches[0].items():
            assert torch.equal(value, batches[1][key]), (kind, key)
        pairs = zip((built[0], loaded[0]), batches, strict=True)
        (ids, logits), (ids_loaded, _) = (generate(model, batch, n=5) for model, batch in pairs)
        assert torch.equal(ids, ids_loaded), kind
        assert logits.isfinite().all(), kind
        assert not set(ids.flatten().tolist()) & set(built[1].tokenizer.all_special_ids), kind


def test_rows_are_ragged_and_padded_on_the_left(built: Pair) -> None:
    for kind in ("ragged", "mixed"):
        mask = prompts.inputs(built[1], kind)["attention_mask"]
        lengths = mask.sum(1)
        assert lengths.unique().numel() == 2 and lengths.max() == mask.shape[1]
        assert torch.equal(mask, mask.sort(dim=1).values)


def test_a_row_without_image_has_no_placeholders(built: Pair) -> None:
    model, processor = built
    visual = prompts.inputs(processor, "mixed")["input_ids"] == model.config.image_token_id
    assert not visual[0].any() and visual[1].any()


def test_the_answer_depends_on_the_pixels(family: str, built: Pair) -> None:
    model, processor = built
    for kind in prompts.kinds(family):
        first, second = (prompts.inputs(processor, kind, seed) for seed in (0, 1))
        assert torch.equal(first["input_ids"], second["input_ids"]), kind
        change = generate(model, first, n=5)[1][:, 0] - generate(model, second, n=5)[1][:, 0]
        assert (change.abs().amax(-1) > 0.1).any(), kind


def test_one_image_may_be_given_beside_its_text(built: Pair) -> None:
    model, processor = built
    image = prompts.image(seed=0, width=120, height=90)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    batch = processor(images=image, text=text, return_tensors="pt")
    expected = prompts.inputs(processor, "one")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(generate(model, dict(batch), n=5)[0], generate(model, expected, n=5)[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_seed_alone_decides_the_weights(family: str, built: Pair, attention: str) -> None:
    torch.manual_seed(5)
    model, _ = tiny.build(family, attention)
    assert model.config._attn_implementation == attention
    for name, weight in built[0].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    other, _ = tiny.build(family, seed=1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
