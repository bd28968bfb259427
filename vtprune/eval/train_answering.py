"""What a language model is taught in training: answers, and to find in the image what is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.eval.scene_questions import KINDS
from vtprune.eval.scene_things import NAMES
from vtprune.eval.train_data import BLOCK, COLOR_NAMES, IGNORE, N_BLOCKS


@dataclass(frozen=True)
class Words:
    """Ids: the prompt before the image ``[P]`` and after it, the names ``[C]``, the colors."""

    before: Tensor
    after: Tensor
    names: Tensor
    colors: Tensor

    @staticmethod
    def of(
        tokenizer: Any, device: torch.device, before: Sequence[str], after: Sequence[str] = ()
    ) -> Words:
        ids = (
            tokenizer.convert_tokens_to_ids(list(words))
            for words in (before, after, NAMES, COLOR_NAMES)
        )
        return Words(*(torch.tensor(some, dtype=torch.long, device=device) for some in ids))


def packed_mask(
    prefix: int, device: torch.device, blocks: int = N_BLOCKS, length: int = BLOCK
) -> Tensor:
    """Attention mask ``[1, 1, S, S]`` (True = visible).

    Question blocks see the prefix (words and image) and themselves, not each other.
    """
    block = torch.arange(blocks, device=device).repeat_interleave(length)
    owner = torch.cat([torch.full((prefix,), -1, device=device), block])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    seen = causal & ((owner[None] == -1) | (owner[None] == owner[:, None]))
    return seen[None, None]


def packed_positions(
    prefix: int, device: torch.device, blocks: int = N_BLOCKS, length: int = BLOCK
) -> Tensor:
    """Positions ``[S]`` of the prefix and then of each block as if it alone followed."""
    behind = block_positions(prefix, device, blocks, length)
    return torch.cat([torch.arange(prefix, device=device), behind])


def block_positions(
    first: int, device: torch.device, blocks: int = N_BLOCKS, length: int = BLOCK
) -> Tensor:
    """Positions ``[blocks * length]`` of the question blocks, each from ``first`` on."""
    return first + torch.arange(length, device=device).repeat(blocks)


def answering_losses(
    model: Any,
    image: Tensor,
    batch: Any,
    words: Words,
    positions: Tensor,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Tensor]:
    """Cross-entropy of the answers and their ends, and the share of right answers per kind.

    ``image`` ``[B, N, D]`` is what the language model gets; ``positions`` are those of the words
    before it, of it, of the words after it and of the question blocks. ``batch`` is a
    ``train_data.Batch``, or has its questions and what visual tokens show; ``kinds`` are those that
    it asks.
    """
    embed = model.get_input_embeddings()
    before, after = (embed(ids).expand(len(image), -1, -1) for ids in (words.before, words.after))
    parts = (before, image, after, embed(batch.ids))
    prefix = sum(part.shape[1] for part in parts[:3])
    mask = packed_mask(prefix, image.device)
    out = model.model.language_model(
        inputs_embeds=torch.cat([part.to(image.dtype) for part in parts], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    names = _naming_loss(image, embed.weight[words.names], batch.thing - 1)
    colors = _naming_loss(image, embed.weight[words.colors], batch.color)
    told = batch.early != IGNORE
    return {
        **_answers(model, out, batch, kinds),
        "naming": 0.1 * (names + colors),
        "looking": 0.3 * _looking_loss(model, batch, words, mask),
        # The word "red" itself learns to look at what is red, one step of attention instead of two.
        # Without it the model answered with any digit in the image.
        "early": 0.5 * F.cross_entropy(model.lm_head(out[told]).float(), batch.early[told]),
    }


def _answers(model: Any, out: Tensor, batch: Any, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The answers' loss, and how many are right, on ``out`` ``[B, S, D]``."""
    asked = batch.labels != IGNORE
    logits = model.lm_head(out[asked]).float()
    wrong = torch.zeros_like(asked)
    wrong[asked] = logits.argmax(-1) != batch.labels[asked]
    right = ~wrong.unflatten(1, (N_BLOCKS, BLOCK)).any(-1)
    shares = {
        f"answer_{kind}_acc": right[batch.kinds == i].float().mean() for i, kind in enumerate(kinds)
    }
    return {
        "answer": F.cross_entropy(logits, batch.labels[asked]),
        "answer_acc": right[batch.kinds != IGNORE].float().mean(),
        **shares,
    }


def lookup(model: Any) -> Any:
    """Returns the attention whose first head is taught to find what a word names."""
    return model.model.language_model.layers[3].self_attn


def _looking_loss(model: Any, batch: Any, words: Words, mask: Tensor) -> Tensor:
    """Teaches one head to look from a color to what has it, and from a name to what bears it.

    Left to itself the model learnt to look up names, but never colors: it answered with any digit
    in the image.
    """
    queries, keys = lookup(model).seen  # [B, H, S, d]
    wanted = _wanted(batch, words)  # [B, T, N]
    n_words, n_tokens, n_asked = len(words.before), wanted.shape[2], wanted.shape[1]
    asked = wanted.sum(-1) > 0
    image, place = asked.nonzero().unbind(1)
    rows, every = queries[:, 0, -n_asked:].float()[asked], keys[:, 0].float()[image]
    logits = (rows[:, None] * every).sum(-1) * rows.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask[0, 0, -n_asked:][place], -float("inf"))
    right = logits[:, n_words : n_words + n_tokens]
    right = right.masked_fill(wanted[asked] == 0, -float("inf"))
    return (logits.logsumexp(-1) - right.logsumexp(-1)).mean()


def _wanted(batch: Any, words: Words) -> Tensor:
    """Where each word of the questions is to look ``[B, T, N]``, 0 = not there."""
    ids = batch.ids.masked_fill(batch.early == IGNORE, -1)[:, :, None]
    named, colored = (ids == words.names).float(), (ids == words.colors).float()  # [B, T, C]
    thing = F.one_hot(batch.thing.clamp(min=0), 1 + len(NAMES))[..., 1:].float()
    color = F.one_hot(batch.color.clamp(min=0), len(COLOR_NAMES)).float()
    color = color * (batch.color >= 0)[..., None]
    return named @ thing.mT + colored @ color.mT


def _naming_loss(image: Tensor, words: Tensor, target: Tensor) -> Tensor:
    """Pulls visual tokens ``[B, N, D]`` towards the embeddings ``[C, D]`` of their words.

    With it the language model finds "red" in the image as it finds it in a text.
    """
    mine = target >= 0
    logits = 10 * F.normalize(image[mine].float(), dim=-1) @ F.normalize(words, dim=-1).T
    return F.cross_entropy(logits, target[mine])
