"""Many questions about an image in one prompt of the language model, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.encoder import encode
from vtprune.engine.inputs import visual
from vtprune.engine.places import spread
from vtprune.errors import UnsupportedError
from vtprune.eval.samples import Asker
from vtprune.eval.scenes import Scene
from vtprune.eval.train_answering import packed_mask, packed_positions
from vtprune.eval.train_data import choose
from vtprune.types import TowerNeed
from vtprune.vlm_adapters._base import VLMAdapter


@dataclass(frozen=True)
class Packed:
    """Prompts as the language model gets them: what precedes the questions, then all of these.

    Attributes:
        embeds: ``[B, S, D]``; ``positions`` ``[1, S]``; ``mask`` ``[1, 1, S, S]``, True = seen.
        visual: ``[B, S]`` bool, visual tokens; ``told`` the words of questions and answers.
        features: ``[B, S, C]`` of the tower, no number where there is no patch.
    """

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    visual: Tensor
    told: Tensor
    features: Tensor


class Packer:
    """Packs scenes and their questions, with right answers, for one model."""

    def __init__(self, adapter: VLMAdapter, processor: Any, need: TowerNeed) -> None:
        self.adapter, self.need = adapter, need
        self.processor, self.ask = processor, Asker(processor)

    @torch.no_grad()
    def __call__(self, scenes: Sequence[Scene]) -> Packed:
        """Returns the packed questions, up to 16 per scene.

        Raises:
            UnsupportedError: the images have other numbers of tokens.
        """
        device = self.adapter.model.device
        asked = self.ask([scenes[0].questions[0].text] * len(scenes), [s.image for s in scenes])
        inputs = {name: value.to(device) for name, value in asked.items()}
        ids = inputs["input_ids"]
        seen = visual(self.adapter, ids)
        if bool((ids != ids[:1]).any()) or not bool(seen.any()):
            raise UnsupportedError(
                f"{self.adapter.facts.family} makes other numbers of tokens of images of one size, "
                "so that their questions cannot be packed. Train on a batch of 1."
            )
        prefix = int(seen[0].nonzero()[-1]) + 1
        found = encode(self.adapter, (), inputs, None, "keep", None, (self.need,))
        tokens = spread([item.tokens for item in found.items], ids, found.items, 0.0)
        features = spread(found.features[self.need], ids, found.items, torch.nan)
        embed, blocks = self.adapter.model.get_input_embeddings(), self._blocks(scenes).to(device)
        count, length = blocks.shape[1:]
        behind = blocks.flatten(1)
        embeds = torch.where(seen[..., None], tokens, embed(ids).to(tokens.dtype))[:, :prefix]
        none = features.new_full((*behind.shape, features.shape[2]), torch.nan)
        return Packed(
            torch.cat([embeds, embed(behind.clamp(min=0)).to(embeds.dtype)], dim=1),
            packed_positions(prefix, device, count, length)[None],
            packed_mask(prefix, device, count, length),
            torch.cat([seen[:, :prefix], torch.zeros_like(behind, dtype=torch.bool)], dim=1),
            torch.cat([torch.zeros_like(seen[:, :prefix]), behind >= 0], dim=1),
            torch.cat([features[:, :prefix], none], dim=1),
        )

    def _blocks(self, scenes: Sequence[Scene]) -> Tensor:
        """Returns ids of questions with their answers, ``[B, Q, T]``, -1 = nothing."""
        tokenizer = self.processor.tokenizer
        end, every = [tokenizer.eos_token_id], []
        for scene in scenes:
            chosen = choose(scene.questions)
            texts = [self.ask.tail(question.text) for question in chosen]
            heads = tokenizer(texts, add_special_tokens=False)["input_ids"]
            answers = tokenizer([q.answer for q in chosen], add_special_tokens=False)["input_ids"]
            every.append([a + b + end for a, b in zip(heads, answers, strict=True)])
        length = max(len(ids) for row in every for ids in row)
        filled = [[ids + [-1] * (length - len(ids)) for ids in row] for row in every]
        rows = zip_longest(*filled, fillvalue=[-1] * length)  # by question, of all scenes
        return torch.tensor(list(rows)).transpose(0, 1)
