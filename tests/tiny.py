"""Tiny random LLaVAs, batches for them, and a reference that only masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from vtprune.types import Selection

IMAGE, PAD, VOCAB = 90, 0, 100
SIDE, PATCH = 42, 7
N = (SIDE // PATCH) ** 2


def build(tower: str = "clip", attention: str = "sdpa", seed: int = 0) -> Any:
    """A 4 + 4 layer LLaVA, 36 visual tokens, weights scaled up so that arg-max means something."""
    cls, select = (CLIPVisionConfig, "default") if tower == "clip" else (SiglipVisionConfig, "full")
    vision = cls(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=select,
        image_seq_length=N,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                scale = 1.2 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    settings = model.generation_config
    settings.suppress_tokens = [IMAGE]
    settings.eos_token_id, settings.pad_token_id = None, PAD
    return model.eval()


def prompt(before: int, after: int, images: int, seed: int) -> list[int]:
    """Token ids: words, then ``images`` images with a word between, then words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 80, (before + images + after,), generator=generator).tolist()
    ids = words[:before]
    for i in range(images):
        ids += [IMAGE] * N + words[before + i : before + i + 1]
    return ids + words[before + images :]


def batch(*prompts: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Left-padded inputs for these prompts, with random pixels for the images they name."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    n_images = int((ids == IMAGE).sum()) // N
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n_images, 3, SIDE, SIDE, generator=generator)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def one_image() -> dict[str, Tensor]:
    return batch(prompt(3, 5, 1, seed=1))


def ragged() -> dict[str, Tensor]:
    """Two rows of different lengths, with one and two images."""
    return batch(prompt(2, 6, 1, seed=2), prompt(4, 3, 2, seed=3))


class Processor:
    """As much of a processor as a strategy guided by text asks for."""

    class tokenizer:
        all_special_ids = (PAD, 1, 2)


@dataclass
class Reference:
    """The full-length model, no cache, dropped tokens hidden by a 4-D mask."""

    model: LlavaForConditionalGeneration
    embeds: Tensor
    rank: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls,
        model: LlavaForConditionalGeneration,
        inputs: dict[str, Tensor],
        selections: Sequence[Selection],
        policy: str,
        *,
        projected: bool = False,
    ) -> Reference:
        """``rank`` [B, L]: place of each column in the short prompt, -1 = hidden.

        Tokens are mixed before the projector, or ``projected``.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeds = model.get_input_embeddings()(ids).clone()
        original = (mask.cumsum(1) - 1).clamp(min=0)
        rank = torch.full_like(ids, -1)
        features = survivors(model, inputs["pixel_values"], selections, projected)
        image = 0
        for b in range(len(ids)):
            place, column = 0, 0
            while column < ids.shape[1]:
                if ids[b, column] != IMAGE:
                    if mask[b, column]:
                        rank[b, column] = place
                        place += 1
                    column += 1
                    continue
                for slot, row in zip(selections[image].slots[0], features[image], strict=True):
                    rank[b, column + slot] = place
                    embeds[b, column + slot] = row
                    place += 1
                column, image = column + N, image + 1
        positions = original if policy == "keep" else rank.clamp(min=0)
        return cls(model, embeds, rank, positions)

    @torch.no_grad()
    def greedy(self, steps: int) -> tuple[Tensor, Tensor]:
        """Returns ids ``[B, steps]`` and logits ``[B, steps, V]``."""
        embeds, rank, positions = self.embeds, self.rank, self.positions
        ids, logits = [], []
        for _ in range(steps):
            out = self._forward(embeds, rank, positions)
            scores = out.clone()
            scores[:, IMAGE] = -float("inf")
            token = scores.argmax(-1)
            ids.append(token)
            logits.append(out)
            new = self.model.get_input_embeddings()(token)[:, None]
            embeds = torch.cat([embeds, new], dim=1)
            rank = torch.cat([rank, rank.max(1, keepdim=True).values + 1], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        return torch.stack(ids, 1), torch.stack(logits, 1)

    def _forward(self, embeds: Tensor, rank: Tensor, positions: Tensor) -> Tensor:
        seen = (rank[:, None, :] <= rank[:, :, None]) & (rank[:, None, :] >= 0)
        seen = seen | torch.eye(rank.shape[1], dtype=torch.bool)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask[:, None],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])


@torch.no_grad()
def survivors(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    selections: Sequence[Selection],
    projected: bool = False,
) -> list[Tensor]:
    """Projected tokens of every image, recomputed from the tower's states and the selections."""
    project = model.model.multi_modal_projector
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    has_cls = states.shape[1] == N + 1
    rows = []
    for image, selection in zip(states, selections, strict=True):
        sources = torch.cat([image[1:], image[:1]]) if has_cls else image
        sources = project(sources) if projected else sources
        if selection.mix is None:
            merged = sources[selection.rows[0]]
        else:
            mix = selection.mix
            merged = torch.zeros(selection.rows.shape[1], sources.shape[1])
            edges = zip(mix.source[0], mix.target[0], mix.weight[0], strict=True)
            for source, target, weight in edges:
                merged[target] += weight * sources[source]
        rows.append(merged if projected else project(merged))
    return rows
