"""What the training of the shipped LLaVA minimises: readouts of the tower, answers, naming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.eval.mini_llava import PREFIX, WIDTH
from vtprune.eval.scene_questions import KINDS
from vtprune.eval.scene_things import DIGITS, NAMES, SIDES
from vtprune.eval.train_data import BLOCK, COLOR_NAMES, IGNORE, LONGEST, MOST, N_BLOCKS, Batch


class Heads(nn.Module):
    """Readouts used in training only, per patch and per image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.image_norm = nn.LayerNorm(WIDTH)
        self.thing = nn.Linear(WIDTH, 1 + len(NAMES))
        self.color = nn.Linear(WIDTH, len(COLOR_NAMES))
        self.place = nn.Linear(WIDTH, 1 + LONGEST)
        self.sides = nn.Linear(WIDTH, len(SIDES) * (1 + len(NAMES)))
        self.present = nn.Linear(WIDTH, len(NAMES) + len(COLOR_NAMES))
        self.counts = nn.Linear(WIDTH, 2 * (1 + MOST))


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states ``[B, 1 + N, D]`` that yield the features, and those after the last block."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-2], states[-1]


def seeing_loss(heads: Heads, states: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses and accuracies of the readouts on ``states`` ``[B, 1 + N, D]``."""
    cls, patches = heads.image_norm(states[:, 0]), heads.patch_norm(states[:, 1:])
    thing = heads.thing(patches).float()
    counts = heads.counts(cls).float().unflatten(-1, (2, -1))
    losses = {
        "thing": F.cross_entropy(
            thing.mT, batch.thing, weight=_rarer_nothing(thing), ignore_index=IGNORE
        ),
        "present": F.binary_cross_entropy_with_logits(heads.present(cls).float(), batch.present),
    }
    if (batch.counts != IGNORE).any():
        losses["counts"] = 0.3 * F.cross_entropy(counts.mT, batch.counts, ignore_index=IGNORE)
    digit = (batch.thing > 0) & (batch.thing <= len(DIGITS))
    losses["digit_acc"] = (thing.argmax(-1) == batch.thing)[digit].float().mean()
    return losses | _thing_losses(heads, patches[batch.color >= 0], batch)


def _thing_losses(heads: Heads, patches: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses of what only patches ``[M, D]`` of things have: color, place and what is beside."""
    mine = batch.color >= 0
    color, place = heads.color(patches).float(), heads.place(patches).float()
    sides = heads.sides(patches).float().unflatten(-1, (len(SIDES), -1))
    beside = batch.sides.mT[mine]  # [M, 4]
    some = beside > 0
    return {
        "color": F.cross_entropy(color, batch.color[mine]),
        "place": F.cross_entropy(place, batch.place[mine], ignore_index=IGNORE),
        "beside": F.cross_entropy(sides.mT, beside, weight=_rarer_nothing(sides)),
        "color_acc": (color.argmax(-1) == batch.color[mine]).float().mean(),
        "place_acc": (place.argmax(-1) == batch.place[mine]).float().mean(),
        "beside_acc": (sides.argmax(-1) == beside)[some].float().mean(),
    }


def _rarer_nothing(logits: Tensor) -> Tensor:
    """Class weights: 0, nothing there, is by far the most frequent."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.3
    return weight


def packed_mask(prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Attention mask ``[1, 1, S, S]`` (True = visible) and positions ``[1, S]``.

    Question blocks see the prefix (words and image) and themselves, not each other.
    """
    block = torch.arange(N_BLOCKS, device=device).repeat_interleave(BLOCK)
    owner = torch.cat([torch.full((prefix,), -1, device=device), block])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    seen = causal & ((owner[None] == -1) | (owner[None] == owner[:, None]))
    inside = torch.arange(BLOCK, device=device).repeat(N_BLOCKS)
    positions = torch.cat([torch.arange(prefix, device=device), prefix + inside])
    return seen[None, None], positions[None]


def answering_loss(
    model: LlavaForConditionalGeneration, features: Tensor, batch: Batch, words: Words
) -> dict[str, Tensor]:
    """Cross-entropy of the answers and their ends, and the share of right answers per kind."""
    embed = cast(nn.Embedding, model.get_input_embeddings())
    image = model.model.multi_modal_projector(features)
    head = embed(words.prefix).expand(len(image), -1, -1).to(image.dtype)
    inputs = torch.cat([head, image, embed(batch.ids).to(image.dtype)], dim=1)
    prefix = head.shape[1] + image.shape[1]
    mask, positions = packed_mask(prefix, image.device)
    out = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, prefix:]
    asked = batch.labels != IGNORE
    logits = model.lm_head(out[asked]).float()
    wrong = torch.zeros_like(asked)
    wrong[asked] = logits.argmax(-1) != batch.labels[asked]
    right = ~wrong.unflatten(1, (N_BLOCKS, BLOCK)).any(-1)
    shares = {
        f"answer_{kind}_acc": right[batch.kinds == i].float().mean() for i, kind in enumerate(KINDS)
    }
    names = _naming_loss(image, embed.weight[words.names], batch.thing - 1)
    colors = _naming_loss(image, embed.weight[words.colors], batch.color)
    return {
        "answer": F.cross_entropy(logits, batch.labels[asked]),
        "naming": 0.1 * (names + colors),
        "looking": 0.3 * _looking_loss(model, batch, words),
        "early": 0.5 * _early_loss(model, out, batch),
        "answer_acc": right[batch.kinds != IGNORE].float().mean(),
        **shares,
    }


def _early_loss(model: LlavaForConditionalGeneration, out: Tensor, batch: Batch) -> Tensor:
    """Asks for the answer at the question's own words too, ``out`` ``[B, S, D]``.

    So the word "red" itself learns to look at what is red, which is one step of attention instead
    of two. Without it the model answered with any digit in the image.
    """
    told = batch.early != IGNORE
    return F.cross_entropy(model.lm_head(out[told]).float(), batch.early[told])


def lookup(model: LlavaForConditionalGeneration) -> Any:
    """Returns the attention whose first head is taught to find what a word names."""
    return model.model.language_model.layers[3].self_attn


def _looking_loss(model: LlavaForConditionalGeneration, batch: Batch, words: Words) -> Tensor:
    """Teaches one head to look from a color to what has it, and from a name to what bears it.

    Left to itself the model learnt to look up names, but never colors: it answered with any digit
    in the image.
    """
    queries, keys = lookup(model).seen  # [B, H, S, d]
    n_words, n_patches = words.prefix.shape[1], batch.thing.shape[1]
    ids = batch.ids.masked_fill(batch.early == IGNORE, -1)[:, :, None]
    named = ids == words.names  # [B, T, C]
    colored = ids == words.colors
    thing = F.one_hot(batch.thing.clamp(min=0), 1 + len(NAMES))[..., 1:].float()
    color = F.one_hot(batch.color.clamp(min=0), len(COLOR_NAMES)).float()
    color = color * (batch.color >= 0)[..., None]
    wanted = named.float() @ thing.mT + colored.float() @ color.mT  # [B, T, N]
    asked = wanted.sum(-1) > 0
    image, place = asked.nonzero().unbind(1)
    first = n_words + n_patches
    rows, every = queries[:, 0, first:].float()[asked], keys[:, 0].float()[image]
    hidden = ~packed_mask(first, ids.device)[0][0, 0, first + place]
    logits = (rows[:, None] * every).sum(-1) * rows.shape[-1] ** -0.5
    logits = logits.masked_fill(hidden, -float("inf"))
    right = logits[:, n_words:first].masked_fill(wanted[asked] == 0, -float("inf"))
    return (logits.logsumexp(-1) - right.logsumexp(-1)).mean()


def _naming_loss(image: Tensor, words: Tensor, target: Tensor) -> Tensor:
    """Pulls projected patches ``[B, N, D]`` towards the embeddings ``[C, D]`` of their words.

    With it the language model finds "red" in the image as it finds it in a text.
    """
    mine = target >= 0
    logits = 10 * F.normalize(image[mine].float(), dim=-1) @ F.normalize(words, dim=-1).T
    return F.cross_entropy(logits, target[mine])


@dataclass(frozen=True)
class Words:
    """Ids: the prompt before the image ``[1, P]``, the names ``[C]``, the colors ``[C]``."""

    prefix: Tensor
    names: Tensor
    colors: Tensor

    @staticmethod
    def of(tokenizer: Any, device: torch.device) -> Words:
        prefix, names, colors = (
            torch.tensor(tokenizer.convert_tokens_to_ids(list(words)), device=device)
            for words in (PREFIX, NAMES, COLOR_NAMES)
        )
        return Words(prefix[None], names, colors)


def sum_losses(values: dict[str, Tensor]) -> Tensor:
    """Adds up what is a loss; accuracies are only logged."""
    return torch.stack([v for name, v in values.items() if not name.endswith("_acc")]).sum()
