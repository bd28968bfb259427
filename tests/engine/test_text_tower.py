"""CLIP's text tower: patches and words in one space, as the authors of CDPruner compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import vtprune
from tests import tiny
from tests.clip import LENGTH, ClipTokenizer, clip
from vtprune import ConfigError, UnsupportedError
from vtprune.registry import build
from vtprune.types import Joint


class Processor(tiny.Processor):
    class tokenizer(tiny.Processor.tokenizer):
        @staticmethod
        def decode(ids: list[int]) -> str:
            return " ".join(map(str, ids))


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
    with vtprune.wrap(model, "trim", keep=keep, **given) as handle:
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
    with vtprune.wrap(model, "cdpruner", keep=9, **given) as handle:
        model(**inputs)
        assert handle.report().images[0].kept == 9
    assert [len(block._forward_hooks) for block in blocks] == before
    with vtprune.wrap(model, "cdpruner", keep=1.0, **given):
        kept = model(**inputs).logits
    assert torch.equal(kept, plain)


def test_what_cannot_be():
    model, pair = tiny.build(), (clip(), ClipTokenizer())
    ask = {"keep": 9, "processor": Processor()}
    with pytest.raises(ConfigError, match="no strategy here reads it"):
        vtprune.wrap(model, "divprune", text_encoder=pair, **ask)
    with pytest.raises(ConfigError, match="give a pair"):
        vtprune.wrap(model, "cdpruner", text_encoder=pair[0], **ask)
    with pytest.raises(UnsupportedError, match="width, 64"):
        vtprune.wrap(model, "trim", text_encoder=(clip(64), ClipTokenizer()), **ask)
    with pytest.raises(UnsupportedError, match="siglip"):
        vtprune.wrap(tiny.build("siglip"), "trim", text_encoder=pair, **ask)
    both = [build("hiprune", plus=True), build("cdpruner")]
    with pytest.raises(ConfigError, match="Leave text_encoder out"):
        vtprune.wrap(model, both, keep=[20, 9], text_encoder=pair, processor=Processor())


def test_two_steps_read_the_same_patches():
    model, inputs = tiny.build(), tiny.ragged()
    both = [build("trim"), build("cdpruner")]
    given = {"text_encoder": (clip(), ClipTokenizer()), "processor": Processor()}
    with vtprune.wrap(model, both, keep=[20, 9], **given) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert [image.kept for image in handle.report().images] == [9, 9, 9]
        assert handle.steps[0].stage.tower_needs == (Joint(2),)
