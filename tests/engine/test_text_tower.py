"""CLIP's text tower: patches and words in one space, as the authors of CDPruner compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

import vtprune
from tests import tiny
from vtprune import ConfigError, UnsupportedError
from vtprune.registry import build
from vtprune.types import Joint

LENGTH, END = 6, 79


class ClipTokenizer:
    """Reads the numbers that ``Processor`` writes, between a first and a last token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [78, *(int(word) % 70 for word in text.split()), END]}


class Processor(tiny.Processor):
    class tokenizer(tiny.Processor.tokenizer):
        @staticmethod
        def decode(ids: list[int]) -> str:
            return " ".join(map(str, ids))


def clip(width: int = 32) -> Any:
    size = {"hidden_size": width, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**size, "num_hidden_layers": 1, "image_size": tiny.SIDE, "patch_size": tiny.PATCH}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 80, "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 78, "eos_token_id": END, "pad_token_id": 0}
    torch.manual_seed(5)
    config = CLIPConfig(vision_config=vision, text_config={**text, **ends}, projection_dim=24)
    return CLIPModel._from_config(config).eval()


@torch.no_grad()
def cosines(model: Any, both: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Per image the mean cosine of its patches to the pieces of the text after the last image."""
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    patches = both.vision_model.post_layernorm(states.hidden_states[-2][:, 1:])
    patches = normalize(both.visual_projection(patches), dim=-1)
    found = []
    for b, row in enumerate(inputs["input_ids"]):
        places = (row == tiny.IMAGE).nonzero()[:, 0]
        words = row[int(places[-1]) + 1 :]
        ids = ClipTokenizer()(" ".join(map(str, words[words > 2].tolist())))["input_ids"]
        pieces = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
        texts = []
        for piece in pieces:
            padded = torch.tensor([piece + [0] * (LENGTH - len(piece))])
            mask = (torch.arange(LENGTH) < len(piece)).long()[None]
            pooled = both.text_model(padded, mask).pooler_output[0]
            texts.append(normalize(both.text_projection(pooled), dim=-1))
        first = sum(int((r == tiny.IMAGE).sum()) for r in inputs["input_ids"][:b]) // tiny.N
        for image in range(first, first + len(places) // tiny.N):
            found.append(patches[image] @ torch.stack(texts).mean(0))
    return found


@pytest.mark.parametrize("keep", [5, 17])
def test_the_least_similar_patches_are_the_relevant_ones(keep):
    model, both, inputs = tiny.build(), clip(), tiny.ragged()
    given = {"text_encoder": (both, ClipTokenizer()), "processor": Processor()}
    with vtprune.wrap(model, "trim", keep=keep, tower=True, **given) as handle:
        model.generate(**inputs, max_new_tokens=1)
        rows = [selection.rows[0].tolist() for selection in handle.selections]
    wanted = [
        c.argsort()[:keep].sort().values.tolist() for c in cosines(tiny.build(), both, inputs)
    ]
    assert rows == wanted
    with vtprune.wrap(model, "trim", keep=keep, processor=Processor()) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert [selection.rows[0].tolist() for selection in handle.selections] != wanted


def test_cdpruner_weighs_with_it_and_nothing_stays_behind():
    model, inputs = tiny.build(), tiny.one_image()
    plain = model(**inputs).logits  # after it transformers' own hooks are there
    blocks = model.model.vision_tower.encoder.layers
    before = [len(block._forward_hooks) for block in blocks]
    given = {"text_encoder": (clip(), ClipTokenizer()), "processor": Processor()}
    with vtprune.wrap(model, "cdpruner", keep=9, tower=True, **given) as handle:
        model(**inputs)
        assert handle.report().images[0].kept == 9
    assert [len(block._forward_hooks) for block in blocks] == before
    with vtprune.wrap(model, "cdpruner", keep=1.0, tower=True, **given):
        kept = model(**inputs).logits
    assert torch.equal(kept, plain)


def test_what_cannot_be():
    model, pair = tiny.build(), (clip(), ClipTokenizer())
    ask = {"keep": 9, "processor": Processor()}
    with pytest.raises(ConfigError, match="pass text_encoder="):
        vtprune.wrap(model, "cdpruner", tower=True, **ask)
    with pytest.raises(ConfigError, match="no strategy here reads it"):
        vtprune.wrap(model, "cdpruner", text_encoder=pair, **ask)
    with pytest.raises(ConfigError, match="give a pair"):
        vtprune.wrap(model, "cdpruner", tower=True, text_encoder=pair[0], **ask)
    with pytest.raises(UnsupportedError, match="width, 64"):
        vtprune.wrap(model, "trim", tower=True, text_encoder=(clip(64), ClipTokenizer()), **ask)
    with pytest.raises(UnsupportedError, match="siglip"):
        vtprune.wrap(tiny.build("siglip"), "trim", tower=True, text_encoder=pair, **ask)
    both = [build("trim", tower=True), build("cdpruner")]
    with pytest.raises(ConfigError, match="all of them or to none"):
        vtprune.wrap(model, both, keep=[20, 9], text_encoder=pair, processor=Processor())


def test_two_steps_read_the_same_patches():
    model, inputs = tiny.build(), tiny.ragged()
    both = [build("trim", tower=True), build("cdpruner", tower=True)]
    given = {"text_encoder": (clip(), ClipTokenizer()), "processor": Processor()}
    with vtprune.wrap(model, both, keep=[20, 9], **given) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert [image.kept for image in handle.report().images] == [9, 9, 9]
        assert handle.steps[0].stage.tower_needs == (Joint(2),)
