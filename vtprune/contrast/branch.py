"""A second run of a model beside one that generates: its own prompt, positions and cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.generation import setting
from vtprune.engine.inputs import valid_tokens
from vtprune.engine.plan import find_adapter
from vtprune.errors import InputError, UnsupportedError


class Branch:
    """Follows the text that another run generates after the same prompt.

    B prompts, L columns each; R rows of text, as many of each prompt.

    Args:
        model: a ``twin``, wrapped or not.
        batch: what ``generate`` would be called with; its image may be another.

    Raises:
        InputError: the batch has no ``input_ids``.
        UnsupportedError: no adapter can serve the model.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        if batch.get("input_ids") is None:
            raise InputError("The batch has no input_ids; give what the model's processor makes.")
        self.model, self.adapter = model, find_adapter(model)
        self.batch = {name: value for name, value in batch.items() if value is not None}
        self.prompt: Tensor = batch["input_ids"]
        self.valid = valid_tokens(self.batch, _padding(model)).long()
        self.text: Tensor | None = None  # [R, L + t], what the cache holds
        self._cache: Any = None
        self._logits = self.prompt.new_zeros(0)
        self._following = self.prompt.new_zeros(0)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Returns the logits of the token after ``ids``, ``[R, V]`` float32.

        Args:
            ids: ``[R, L + t]``. With t = 0 it begins anew; else each row goes on from a row of the
                same prompt at the last call, as beams and samples do.

        Raises:
            InputError: ``ids`` begin with another prompt, or go on from no such row.
            UnsupportedError: several rows of a prompt, of which tokens leave inside the language
                model.
        """
        length = self.prompt.shape[1]
        if self.text is None or ids.shape[1] == length:
            self._begin()
        for column in range(self._follow(ids), ids.shape[1]):
            self._step(ids[:, column : column + 1])
        return self._logits

    def _begin(self) -> None:
        """Reads the prompts."""
        positions = self._positions()
        self._following = _last(positions) + 1
        batch = {**self.batch, "attention_mask": self.valid, "position_ids": positions}
        self.text = self.prompt
        self._read(batch)

    def _positions(self) -> Tensor:
        """Returns the position ids with which ``generate`` reads the prompts."""
        rest = {k: v for k, v in self.batch.items() if not k.startswith("pixel_values")}
        rest.pop("input_ids")
        prepare = self.model._prepare_position_ids_for_generation
        positions = self.batch.get("position_ids")
        if positions is None:
            positions = prepare(self.prompt, {**rest, "attention_mask": self.valid})
        return positions + self.adapter.first_position

    def _follow(self, ids: Tensor) -> int:
        """Brings the rows of the cache into the order of ``ids``; returns its columns, a count."""
        text, batch = self._known(ids), len(self.prompt)
        had = text.unflatten(0, (batch, -1))
        now = ids[:, : text.shape[1]].unflatten(0, (batch, -1)).to(had.device)
        same = (now[:, :, None] == had[:, None]).all(-1)  # [B, R / B, rows there are / B]
        if not bool(same.any(-1).all()):
            raise InputError(
                "The text does not go on from that of the last call. Give the prompts that are "
                "generated from, one object per call of generate, and no assistant model."
            )
        first = torch.arange(batch, device=had.device)[:, None] * had.shape[1]
        rows = (same.long().argmax(-1) + first).flatten()
        if len(rows) != len(text):
            self._expand(len(rows) // len(text))
        if not torch.equal(rows, torch.arange(len(text), device=rows.device)):
            self._cache.reorder_cache(rows)
            self._logits, self.text = self._logits[rows.to(self._logits.device)], text[rows]
        return text.shape[1]

    def _known(self, ids: Tensor) -> Tensor:
        """Returns the text in the cache, of which ``ids`` can be a continuation by their shape."""
        text = self.text
        if text is None or len(ids) % len(text) or ids.shape[1] < text.shape[1]:
            raise InputError(
                f"The text has shape {tuple(ids.shape)}, which cannot go on from one of "
                f"{tuple(self.prompt.shape if text is None else text.shape)}. Give the prompts "
                "that are generated from, and no assistant model or prompt lookup."
            )
        return text

    def _expand(self, copies: int) -> None:
        """Lets what is known of prompts be of ``copies`` rows each; the cache is not touched."""
        after, decoding = getattr(self._cache, "_vtprune", (None, None))
        if decoding is not None:
            raise UnsupportedError(
                "Several texts per prompt (num_beams, num_return_sequences) do not go with a view "
                "whose tokens leave inside the language model. Ask for one, or give a strategy "
                "that acts before it, such as 'damro'."
            )
        self._following = self._following.repeat_interleave(copies)
        if after is not None:
            fields = ("index", "following", "shift")
            more = {name: getattr(after, name).repeat_interleave(copies, dim=0) for name in fields}
            self._cache._vtprune = replace(after, **more), None

    def _step(self, new: Tensor) -> None:
        """Reads one more token of each row, ``[R, 1]``."""
        text = self._known(self.text if self.text is not None else new)
        mask = self.valid.repeat_interleave(len(text) // len(self.prompt), dim=0)
        done = text.shape[1] - self.prompt.shape[1]
        positions = (self._following + done)[:, None]
        if self.adapter.facts.mrope:
            positions = positions.expand(3, -1, -1)
        self.text = torch.cat([text, new.to(text.device)], dim=1)
        batch = {
            "input_ids": new,
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), done + 1)], dim=1),
            "position_ids": positions,
            "past_key_values": self._cache,
        }
        self._read(batch)

    def _read(self, batch: Mapping[str, Any]) -> None:
        """Calls the model, to which nothing is known of the run that this one is beside."""
        out = Context().run(self.model, **batch, use_cache=True, return_dict=True, logits_to_keep=1)
        self._cache, self._logits = out.past_key_values, out.logits[:, -1].float()


def _padding(model: Any) -> int | None:
    """The id that ``generate`` takes for padding when it is given no mask."""
    pad, eos = (setting({}, None, model.generation_config, f"{x}_token_id") for x in ("pad", "eos"))
    return None if pad in (eos if isinstance(eos, list) else [eos]) else pad


def _last(positions: Tensor) -> Tensor:
    """The highest id of each row, ``[B]``."""
    return positions[-3:].amax((0, 2)) if positions.ndim == 3 else positions.amax(1)
