"""Assisted decoding: the target says what it says alone, the draft what it says alone."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

import vtprune
from tests import tiny
from tests.families import prompts
from vtprune import ConfigError, InputError, UnsupportedError, assisted
from vtprune.eval import tiny as families

FAMILIES = ("llava", "qwen2_5_vl")
NEW = 12


def drafting(model: Any) -> Any:
    """A twin that proposes whatever it is sure of."""
    draft = assisted.twin(model)
    draft.generation_config.assistant_confidence_threshold = 0.0
    draft.generation_config.num_assistant_tokens = 4
    return draft


def of_family(family: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Target, draft and a prompt with an image."""
    model, processor = families.build(family)
    model.generation_config.eos_token_id = None
    return model, drafting(model), prompts.inputs(processor, "one")


def several() -> dict[str, Tensor]:
    return tiny.batch(tiny.prompt(4, 3, 2, seed=3))


@pytest.mark.parametrize("keep", [1.0, 0.5, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_says_what_it_says_alone(family: str, keep: float) -> None:
    model, draft, batch = of_family(family)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    want = model.generate(**batch, **settings)
    with vtprune.wrap(draft, "divprune", keep=keep) as handle:
        got = assisted.generate(model, handle, batch, **settings)
    assert torch.equal(got.output, want)
    assert got.new_tokens == NEW and got.proposed > 0
    assert got.acceptance == got.accepted / got.proposed
    if keep == 1.0:  # both say the same, so that the last tokens alone may go to waste
        assert got.proposed - got.accepted <= 1
        assert got.target_forwards == NEW - got.accepted < NEW / 2


def test_several_images_and_output_in_parts() -> None:
    model, batch = tiny.build(), several()
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**batch, **settings, do_sample=False)
    with vtprune.wrap(drafting(model), "divprune", keep=0.7) as handle:
        got = assisted.generate(model, handle, batch, **settings, do_sample=False)
    assert torch.equal(got.output.sequences, want.sequences)
    assert torch.allclose(torch.stack(got.output.logits), torch.stack(want.logits), atol=1e-4)
    assert 0 < got.target_forwards < NEW and got.accepted == NEW - got.target_forwards


def test_a_wrapped_target_says_what_it_says_wrapped() -> None:
    model, batch = tiny.build(), tiny.one_image()
    twin = drafting(model)
    settings = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.3}
    with (
        vtprune.wrap(model, "divprune", keep=20),
        vtprune.wrap(twin, "divprune", keep=8) as draft,
    ):
        want = model.generate(**batch, **settings)
        assert torch.equal(assisted.generate(model, draft, batch, **settings).output, want)


@pytest.mark.parametrize(
    ("family", "positions"), [("llava", "keep"), ("llava", "renumber"), ("qwen2_5_vl", "keep")]
)
def test_the_draft_says_what_it_says_alone(family: str, positions: Any) -> None:
    """Whatever the target rejects, accepts or adds, as if it had stood in the prompt."""
    _, draft, batch = of_family(family)
    ids, n = batch["input_ids"], 4
    with vtprune.wrap(draft, "divprune", keep=0.5, positions=positions) as handle:
        proposing = assisted._Draft(handle, batch)
        with torch.no_grad():
            given = torch.empty(1, 0, dtype=ids.dtype)
            for accepted, added in ((0, 5), (2, 7), (4, 9), (3, 11), (0, 12)):
                config = GenerationConfig(assistant_confidence_threshold=0.0)
                out = proposing.generate(torch.cat([ids, given], 1), n, config, LIST)
                new = out["sequences"][:, ids.shape[1] + given.shape[1] :]
                assert torch.equal(new, alone(draft, batch, given, n))
                given = torch.cat([given, new[:, :accepted], torch.tensor([[added]])], 1)
    assert [at for at, _ in proposing.rounds] == [0, 1, 4, 9, 13]


LIST = LogitsProcessorList()


def alone(model: Any, batch: dict[str, Tensor], given: Tensor, n: int) -> Tensor:
    """What a wrapped model says when the given tokens stand at the end of its prompt."""
    more = {**batch, "input_ids": torch.cat([batch["input_ids"], given], 1)}
    for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in batch:
            tail = batch[name].new_full(given.shape, filler)
            more[name] = torch.cat([batch[name], tail], 1)
    found = []
    for _ in range(n):
        token = model(**more).logits[:, -1].argmax(-1, keepdim=True)
        found.append(token)
        more["input_ids"] = torch.cat([more["input_ids"], token], 1)
        for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in more:
                tail = more[name].new_full(token.shape, filler)
                more[name] = torch.cat([more[name], tail], 1)
    return torch.cat(found, 1)


def test_ends_and_doubts_stop_a_proposal() -> None:
    model, batch = tiny.build(), tiny.batch(tiny.prompt(3, 5, 1, seed=7))
    want = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist()
    with vtprune.wrap(drafting(model), "divprune", keep=1.0) as handle:
        end = next(token for at, token in enumerate(want) if token not in want[:at] and at > 2)
        settings = {"max_new_tokens": NEW, "do_sample": False}
        got = assisted.generate(model, handle, batch, **settings, eos_token_id=end)
        assert got.new_tokens == want.index(end) + 1 and got.accepted == got.proposed
        handle.model.generation_config.assistant_confidence_threshold = 1.1
        got = assisted.generate(model, handle, batch, **settings)
        assert got.accepted == got.proposed == NEW // 2  # one at a time
        sampled = assisted.generate(
            model, handle, batch, max_new_tokens=NEW, do_sample=True, top_k=1
        )
        assert sampled.output[0, -NEW:].tolist() == want


def test_the_draft_may_read_its_own_prompt() -> None:
    model, batch = tiny.build(), several()
    with vtprune.wrap(drafting(model), "divprune", keep=5) as handle:
        own = tiny.one_image()
        settings = {"max_new_tokens": NEW, "do_sample": False}
        want = model.generate(**batch, **settings)
        got = assisted.generate(model, handle, batch, draft_batch=own, **settings)
        assert torch.equal(got.output, want)
        assert handle.selections[0].n == tiny.N and len(handle.selections) == 1


def test_a_twin_shares_weights_alone() -> None:
    model = tiny.build()
    twin = assisted.twin(model)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    assert pairs and all(one is other for one, other in pairs)
    assert twin is not model and twin.base_model is not model.base_model
    twin.generation_config.num_assistant_tokens = 3
    assert model.generation_config.num_assistant_tokens != 3
    twin.register_forward_hook(lambda *_: pytest.fail("a hook of the twin ran for the model"))
    model(**tiny.one_image())


def test_what_cannot_be_is_refused() -> None:
    model, batch = tiny.build(), tiny.one_image()
    handle = vtprune.wrap(model, "divprune", keep=4)
    with handle, pytest.raises(ConfigError, match="The draft is the target itself"):
        assisted.generate(model, handle, batch)
    with pytest.raises(ConfigError, match="handle was removed"):
        assisted.generate(tiny.build(), handle, batch)
    inside = vtprune.wrap(assisted.twin(model), "fastv", keep=0.5)
    with inside, pytest.raises(UnsupportedError, match="acts inside the language model"):
        assisted.generate(model, inside, batch)
    with vtprune.wrap(assisted.twin(model), "divprune", keep=4) as handle:
        padded = {**batch, "attention_mask": batch["attention_mask"] * 0}
        for wrong in (tiny.ragged(), padded, {}):
            with pytest.raises(InputError, match="one prompt at a time"):
                assisted.generate(model, handle, batch, draft_batch=wrong)
        with pytest.raises(InputError, match="one prompt at a time"):
            assisted.generate(model, handle, tiny.ragged())
        other = tiny.build()
        other.resize_token_embeddings(tiny.VOCAB + 8)
        with pytest.raises(UnsupportedError, match="knows 108 tokens and the draft 100"):
            assisted.generate(other, handle, batch)
        assisted.generate(model, handle, batch, max_new_tokens=1)
        assert not model._forward_hooks


@pytest.mark.slow
def test_the_example_says_what_was_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "examples" / "assisted_decoding.py"
    few = ["--new-tokens", "3", "--keep", "256", "4"]
    monkeypatch.setattr("sys.argv", [script.name, *few])
    runpy.run_path(str(script), run_name="__main__")
    whole, few_tokens = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    keep, share, _, accepted, proposed, calls, new = whole
    assert (keep, share, new) == ("256", "100.0", "42") and accepted == proposed
    assert int(calls) == 42 - int(accepted) < int(few_tokens[5])
