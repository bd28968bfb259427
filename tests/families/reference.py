"""The full-length model of any family, without a cache, with tokens hidden instead of dropped.

Independent of the engine's ways: nothing is shortened. The prompt keeps its length, the model makes
its own masks, and hooks on the decoder layers hide the columns of tokens that left.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vtprune import Handle
from vtprune.engine.cuts import Cut
from vtprune.types import Selection

# By layer and row: the columns of the short prompt that a stage chose from, and what it chose.
Chosen = dict[int, dict[int, tuple[Tensor, Selection]]]
PER_TOKEN = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


class Reference:
    """What a wrapped call should have computed.

    Args:
        model: the same model, unwrapped and eager.
        inputs: what the call was given.
        handle: the handle after the call; read are its selections, its map of the prompt, and the
            columns that its stages inside the language model left.
        made: tokens ``[K, D]`` of items whose selection mixes, where the mixing was in the tower.
        chosen: what the stages inside the language model chose, where they mix.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        handle: Handle,
        made: list[Tensor] | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        self.model, self.inputs, self.chosen = model, inputs, chosen or {}
        base = model.base_model
        self.text = getattr(base, "language_model", None) or base.text_model
        ids = inputs["input_ids"]
        prompt = handle._prompt
        assert prompt is not None
        self.length = ids.shape[1]
        self.valid = inputs["attention_mask"].bool()
        self.mrope = handle.adapter.facts.mrope
        self.renumber = handle.positions == "renumber" and not self.mrope
        self.made, self.selections = made, handle.selections
        modalities = [item.modality for item in handle._items]
        self.placeholders = list(dict.fromkeys(m.placeholder for m in modalities))
        self.kinds = [m.placeholder for m in modalities]
        decoding = handle._decoding
        # Column of the full prompt at which each column of the short one is put here.
        places = prompt.index.sort(dim=1).values
        sources = prompt.index
        self.places = [row[row >= 0] for row in places]
        self.sources = [row[row >= 0] for row in sources]
        self.cuts: dict[int, Cut] = {} if decoding is None else decoding.cuts
        self.left = [row >= 0 for row in prompt.index]
        inside = {step.positions for step in handle.inside}
        self.renumber_inside = "renumber" in inside and not self.mrope

    @torch.no_grad()
    def greedy(self, steps: int) -> tuple[Tensor, Tensor]:
        """Returns ids ``[B, steps]`` and logits ``[B, steps, V]``."""
        inputs = {k: v for k, v in self.inputs.items() if k != "labels"}
        barred = self.model.generation_config.suppress_tokens
        ids, logits = [], []
        with self._hooked():
            for _ in range(steps):
                out = self.model(**inputs, use_cache=False).logits[:, -1]
                logits.append(out)
                ids.append(out.index_fill(1, torch.tensor(barred), -float("inf")).argmax(-1))
                inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[-1][:, None]], dim=1)
                for name in PER_TOKEN.keys() & inputs.keys():
                    value = self._next(name, inputs[name])
                    inputs[name] = torch.cat([inputs[name], value], dim=1)
        return torch.stack(ids, 1), torch.stack(logits, 1)

    def _next(self, name: str, so_far: Tensor) -> Tensor:
        # PaliGemma's prefix has type 0 and sees itself both ways; what is generated has type 1.
        prefix = name == "token_type_ids" and "PaliGemma" in type(self.model).__name__
        return so_far.new_full((len(so_far), 1), 1 if prefix else PER_TOKEN[name])

    def _hooked(self) -> ExitStack:
        stack = ExitStack()
        hook = self.text.register_forward_pre_hook(self._enter, with_kwargs=True)
        stack.callback(hook.remove)
        for number, layer in enumerate(self.text.layers):
            hook = layer.register_forward_pre_hook(self._layer(number), with_kwargs=True)
            stack.callback(hook.remove)
        return stack

    # -- before the language model ---------------------------------------------------------------

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        self.total = embeds.shape[1]
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for placeholder in self.placeholders:
            visual[:, : self.length] |= self.inputs["input_ids"] == placeholder
        kwargs = dict(kwargs, inputs_embeds=self._mix(embeds))
        if kwargs.get("deepstack_visual_embeds") is not None:
            planes = []
            for plane in kwargs["deepstack_visual_embeds"]:
                full = torch.zeros(embeds.shape)
                full[visual] = plane
                planes.append(self._mix(full, planes=True)[visual])
            kwargs["deepstack_visual_embeds"] = planes
        kwargs["position_ids"] = self._positions(kwargs.get("position_ids"))
        return args, kwargs

    def _mix(self, embeds: Tensor, planes: bool = False) -> Tensor:
        """Writes what each selection makes of its tokens into the columns that stay."""
        out = embeds.clone()
        ids = self.inputs["input_ids"]
        spots = {token: (ids == token).nonzero() for token in self.placeholders}
        for i, (token, selection) in enumerate(zip(self.kinds, self.selections, strict=True)):
            where, spots[token] = spots[token][: selection.n], spots[token][selection.n :]
            row, columns = int(where[0, 0]), where[:, 1]
            if self.made is not None and not planes:
                rows = self.made[i]
            else:
                rows = mixed(selection, embeds[row, columns])
            slots = selection.slots[0].sort().values
            out[row, columns[slots]] = rows
        return out

    def _positions(self, given: Tensor | None) -> Tensor:
        """The ids of the call: the model's own, at the places where tokens stand now."""
        counted = (self._every().long().cumsum(1) - 1).clamp(min=0)
        if self.mrope:
            assert given is not None
            out = given.clone()
            for b, (places, sources) in enumerate(zip(self.places, self.sources, strict=True)):
                out[:, b, places] = given[:, b, sources]
            return out
        first = int(given.min()) if given is not None else 0
        if self.renumber:
            seen = self._seen(0)
            return (seen.long().cumsum(1) - 1).clamp(min=0) + first
        out = counted.clone()
        for b, (places, sources) in enumerate(zip(self.places, self.sources, strict=True)):
            out[b, places] = counted[b, sources]
        return out + first

    # -- inside it -------------------------------------------------------------------------------

    def _every(self) -> Tensor:
        new = torch.ones(len(self.valid), self.total - self.length, dtype=torch.bool)
        return torch.cat([self.valid, new], dim=1)

    def _cut(self, number: int) -> Cut | None:
        before = [at for at in self.cuts if at <= number]
        return self.cuts[max(before)] if before else None

    def _seen(self, number: int) -> Tensor:
        """Columns ``[B, total]`` that a layer sees."""
        seen = self._every()
        seen[:, : self.length] = False
        cut = self._cut(number)
        for b, places in enumerate(self.places):
            short = self.left[b].long().cumsum(0) - 1  # column of the short prompt -> token of it
            if cut is None:
                seen[b, places] = True
            else:
                kept = cut.index[b]
                seen[b, places[short[kept[kept >= 0]]]] = True
        return seen & torch.cat([self.valid, seen[:, self.length :]], dim=1)

    def _layer(self, number: int) -> Any:
        typed = "layer_type" in inspect.signature(self.text.rotary_emb.forward).parameters

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen, mask = self._seen(number), kwargs["attention_mask"]
            assert mask is not None, "eager attention has a mask"
            hidden = torch.finfo(mask.dtype).min
            mask = mask.expand(len(seen), -1, -1, -1).masked_fill(~seen[:, None, None], hidden)
            itself = torch.eye(self.total, dtype=torch.bool)
            mask = mask.masked_fill(~seen[:, None, :, None] & itself, 0.0)
            kwargs = dict(kwargs, attention_mask=mask)
            args = (self._mix_inside(number, args[0]), *args[1:])
            if self.renumber_inside and self._cut(number) is not None:
                positions = (seen.long().cumsum(1) - 1).clamp(min=0)
                kinds = (self.text.config.layer_types[number],) if typed else ()
                kwargs["position_embeddings"] = self.text.rotary_emb(args[0], positions, *kinds)
            return args, kwargs

        return before

    def _mix_inside(self, number: int, hidden: Tensor) -> Tensor:
        """Writes what the stage before a layer makes of its tokens into the columns that stay."""
        hidden = hidden.clone()
        for b, (columns, selection) in self.chosen.get(number, {}).items():
            short = self.left[b].long().cumsum(0) - 1
            places = self.places[b][short[columns]]
            slots = selection.slots[0]
            if self.renumber_inside:
                slots = slots.sort().values
            hidden[b, places[slots]] = mixed(selection, hidden[b, places])
        return hidden


def mixed(selection: Selection, tokens: Tensor) -> Tensor:
    """What a selection makes of the tokens ``[n, D]`` of its item."""
    if selection.mix is None:
        return tokens[selection.rows[0]]
    mix = selection.mix
    out = torch.zeros(selection.rows.shape[1], tokens.shape[1])
    for source, target, weight in zip(mix.source[0], mix.target[0], mix.weight[0], strict=True):
        out[target] += weight * tokens[source]
    return out
