"""What an unwrapped model looks at in its images while it answers, layer by layer and step by step.

B prompts, L columns, T steps of decoding, NL layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.compaction import rows_of
from vtprune.engine.encoder import encode
from vtprune.engine.inputs import has_visuals, valid_tokens, visual
from vtprune.engine.items import Item
from vtprune.engine.onlooker import last_rows
from vtprune.engine.plan import find_adapter
from vtprune.engine.rows import Rows, Texts
from vtprune.engine.twin import twin
from vtprune.errors import ConfigError, HookError, InputError
from vtprune.types import Facts


@dataclass(frozen=True)
class Look:
    """What was looked at in one image or video.

    Attributes:
        attention: ``[T, NL, N]`` float32, mean over heads, to its tokens that are made of patches.
        grid: ``(t, h, w)`` of those, or None.
    """

    attention: Tensor
    grid: tuple[int, int, int] | None


class _Reader:
    """Reads the last query of every call, or of the first what all words after the image see."""

    looks_on = True  # for the tap: what it reads are the model's own calls

    def __init__(
        self, modules: Sequence[nn.Module], valid: Tensor, seen: Tensor, words: bool
    ) -> None:
        self.valid, self.seen, self.kind = valid, seen, Texts if words else Rows
        self.found: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def reads(self, module: nn.Module) -> bool:
        """Returns whether it is one of the modules."""
        return module in self.found

    @torch.no_grad()
    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
    ) -> None:
        """Takes ``[B, L]`` of queries ``[B, H, m, d]``; what goes to decoded tokens is left out."""
        found, length = self.found[module], self.valid.shape[1]
        if not found:
            reader = self.kind(module, self.valid.to(q.device), self.seen.to(q.device))
            with reader.only():
                reader.read(module, q, k, mask, scale, v)
            found.append(reader.value())
            return
        rows = last_rows(q, k, mask, scale).mean(1)
        forgotten = max(0, length + len(found) - rows.shape[1])  # a window forgets from the left
        found.append(F.pad(rows, (forgotten, 0))[:, :length])

    def attention(self) -> Tensor:
        """Returns all that was read, ``[T, NL, B, L]``.

        Raises:
            HookError: some module was not called.
        """
        if not all(self.found.values()):
            raise HookError(
                "A layer did not call the attention interface. Use a language model whose "
                "attention is sdpa or eager."
            )
        device = self.valid.device
        return torch.stack([torch.stack(rows).to(device) for rows in self.found.values()], dim=1)


@torch.no_grad()
def look(
    model: Any,
    batch: Mapping[str, Any],
    layers: Sequence[int],
    max_new_tokens: int = 1,
    *,
    words: bool = False,
) -> list[Look]:
    """Lets the whole model answer greedily, and returns what it looked at, per image and video.

    Args:
        model: wrapped or not: it is run as it is unwrapped.
        batch: what ``generate`` takes, padded on the left.
        layers: 0-based, of the language model.
        max_new_tokens: T at most; an image has as many steps as its prompt has an answer.
        words: the first step is the mean over all words after the last image, not the last alone.

    Raises:
        ConfigError: layers that the model does not have.
        InputError: no image, or padding on the right.
    """
    view = twin(model)
    adapter, ids = find_adapter(view), batch["input_ids"]
    check_layers(layers, adapter.facts)
    if not has_visuals(adapter, batch):
        raise InputError("The batch holds no image to look at; give pixels with the prompt.")
    valid = valid_tokens(batch, None)
    if not bool(valid[:, -1].all()):
        raise InputError("The batch is padded on the right; set padding_side='left'.")
    modules: list[Any] = [adapter.decoder[layer].self_attn for layer in layers]  # type: ignore
    reader = _Reader(modules, valid, visual(adapter, ids), words)

    def answer() -> tuple[Sequence[Item], Tensor]:
        seen = encode(adapter, [], batch, None, "keep")
        pixels = {name for modality in adapter.modalities for name in modality.pixels}
        rest = {k: v for k, v in batch.items() if k not in pixels}
        rest |= {"mm_encoder_outputs": dict(seen.outputs), "max_new_tokens": max_new_tokens}
        with tap.reading(reader):
            out = view.generate(**rest, do_sample=False, num_beams=1)
        return seen.items, out[:, ids.shape[1] :]

    implementation = adapter.language_model.config._attn_implementation or "eager"
    tap.install(implementation)
    try:
        items, new = Context().run(answer)
    finally:
        tap.uninstall(implementation)
    return _apart(reader.attention(), ids, items, _lengths(new, view))


def check_layers(layers: Sequence[int], facts: Facts) -> None:
    """Raises ConfigError for layers that a language model does not have."""
    depth = facts.decoder_layers
    if not layers or any(isinstance(x, bool) or x not in range(depth) for x in layers):
        raise ConfigError(f"layers={tuple(layers)}: give some of 0 to {depth - 1}.")


def _lengths(new: Tensor, model: Any) -> list[int]:
    """Returns how many of the tokens ``[B, T]`` each answer has, with the one that ends it."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=new.device).reshape(-1)
    over = torch.isin(new, ends).cumsum(1).cumsum(1) > 1
    return (~over).sum(1).tolist()


def _apart(
    attention: Tensor, ids: Tensor, items: Sequence[Item], steps: Sequence[int]
) -> list[Look]:
    """Cuts ``[T, NL, B, L]`` into what each image got."""
    own = {item.modality.placeholder: [] for item in items}
    for item in items:
        own[item.modality.placeholder].append(len(item))
    parts = {
        token: iter(attention[:, :, ids == token].split(lengths, dim=-1))
        for token, lengths in own.items()
    }
    found = []
    for item, row in zip(items, rows_of(ids, items), strict=True):
        mine = next(parts[item.modality.placeholder])[: steps[row]]
        found.append(Look(mine[..., item.free.to(mine.device)], item.grid))
    return found
