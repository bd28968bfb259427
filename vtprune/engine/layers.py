"""Stages inside the language model: tokens leave before a layer, and later layers run shorter.

A pre-hook on each layer from the first stage on gathers the hidden states and cuts what the model
hands to the layer: rotary embeddings, mask, positions. The cache of each layer just holds as many
entries as that layer saw.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.cuts import Cut, Rotary, is_static
from vtprune.engine.decoding import Decoding
from vtprune.engine.report import StageReport
from vtprune.engine.rows import READERS
from vtprune.engine.signals import Images, Step, decide
from vtprune.engine.states import STATES
from vtprune.engine.tap import reading
from vtprune.engine.timing import timed
from vtprune.engine.transition import watch
from vtprune.errors import UnsupportedError
from vtprune.types import DecoderNeed, Inside, RowNeed, Selection, Spans, Transition


class Layers:
    """The hooks of one handle in its language model.

    Args:
        model: the language model; ``layers`` its decoder layers in order.
        steps: stages with site ``DECODER``, in order of their layers.
        current: returns the running call's ``Decoding``, or None to leave a call alone.
        forgetting: layers whose cache may lose tokens that do not leave.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        steps: Sequence[Step],
        current: Callable[[], Decoding | None],
        forgetting: Sequence[int] = (),
    ) -> None:
        self.model, self.layers, self.current = model, list(layers), current
        self.forgetting = forgetting
        self.steps = {step.stage.layer or 0: step for step in steps}
        needs = [n for s in steps for n in s.stage.quantities if isinstance(n, DecoderNeed)]
        self.needs = list(dict.fromkeys(needs))

    def install(self, undo: ExitStack) -> None:
        """Registers the hooks; ``undo`` takes them off."""
        begin = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        undo.callback(begin.remove)
        acting = [*(need.layer for need in self.needs), *self.steps, *self.forgetting]
        first = min(acting, default=len(self.layers))
        for number in range(first, len(self.layers)):
            hook = self.layers[number].register_forward_pre_hook(
                self._hook(number), with_kwargs=True
            )
            undo.callback(hook.remove)
        for need in self.needs:
            if isinstance(need, Transition):
                for hook in watch(self.layers[need.layer], need, self.current):
                    undo.callback(hook.remove)
        undo.callback(self.model.register_forward_hook(self._end).remove)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        decoding = self.current()
        if decoding is not None and not decoding.prefilled:
            embeds = kwargs["inputs_embeds"]
            decoding.expand(len(embeds))
            if embeds.shape[1] != decoding.valid.shape[1]:
                raise UnsupportedError(
                    f"The language model was called with {embeds.shape[1]} of the prompt's "
                    f"{decoding.valid.shape[1]} tokens. Stages inside it need the prompt in one "
                    "piece."
                )
            spans, made = decoding.spans, [n for n in self.needs if isinstance(n, Spans)]
            if made and spans is not None:
                rows = spans().to(embeds.device).repeat_interleave(decoding.copies, dim=0)
                decoding.rows |= {need: rows.clone() for need in made}

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        decoding = self.current()
        if decoding is not None:
            decoding.finish()

    def _hook(self, number: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            decoding = self.current()
            if decoding is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            device = _device(module, hidden)
            hidden = hidden.to(device)
            rest = {k: _to(device, v) for k, v in kwargs.items() if k != "hidden_states"}
            decoding.on(device)
            if not decoding.prefilled:
                return self._prefill(decoding, number, hidden, rest)
            cut = decoding.cached(number)
            if cut is None:
                return None
            held, cache = decoding.held.get(number), rest["past_key_values"]
            known = cut.index.shape[1] if held is None else cut.length
            seen = cache.get_seq_length(number) - known
            self._refuse_window(number, cut.length + seen + hidden.shape[1], rest)
            return (hidden,), cut.step(rest, seen, self._rotary(number))

        return before

    # Asked in every layer and step, but the same in all of them.
    @functools.cached_property
    def _windows(self) -> list[int | None]:
        return [getattr(layer.self_attn, "sliding_window", None) for layer in self.layers]

    @functools.cached_property
    def _by_type(self) -> bool:
        return "layer_type" in inspect.signature(self.model.rotary_emb.forward).parameters

    def _refuse_window(self, number: int, length: int, kwargs: dict[str, Any]) -> None:
        """Raises where a sliding window would count tokens that are there instead of positions."""
        window, static = self._windows[number], is_static(kwargs)
        if any(self._windows) and (static or (window is not None and length > window)):
            what = "a static cache" if static else f"more than {window} tokens"
            raise UnsupportedError(
                f"Layer {number} of this language model sees a sliding window, and tokens that "
                f"leave inside it do not go with {what}. Use a strategy that acts before the "
                "language model, such as 'divprune'."
            )

    def _rotary(self, number: int) -> Rotary:
        """Returns what turns position ids into the rotary embeddings of a layer."""
        embed = self.model.rotary_emb
        if not self._by_type:
            return embed
        return functools.partial(embed, layer_type=self.model.config.layer_types[number])

    def _prefill(
        self, decoding: Decoding, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        self._refuse_window(number, decoding.valid.shape[1], kwargs)
        cut, rotary = decoding.cut(number), self._rotary(number)
        own = kwargs if cut is None else cut.prompt(kwargs, hidden, rotary)
        step = self.steps.get(number)
        if step is not None:  # it reads what the layer would compute if no token left
            self._read_for([step], decoding, number, hidden, own)
            hidden, after = self._stage(decoding, step, cut, hidden)
            if after is not None:
                decoding.cuts[number] = after
                own = after.prompt(kwargs, hidden, rotary)
        later = [step for layer, step in self.steps.items() if layer > number]
        self._read_for(later, decoding, number, hidden, own)
        return (hidden,), own

    def _read_for(
        self,
        steps: Sequence[Step],
        decoding: Decoding,
        number: int,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Reads what ``steps`` need of the layer that comes now."""
        for need in self.needs:
            asked = any(need in step.stage.needs for step in steps)
            if asked and need.layer == number and not isinstance(need, (Spans, Transition)):
                decoding.rows[need] = self._read(decoding, need, hidden, kwargs)

    @timed("score")
    def _read(
        self,
        decoding: Decoding,
        need: DecoderNeed,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Returns what is needed of the layer that comes now, ``[B, L, ...]`` over the prompt.

        That of a whole row is ``[B, ...]``.
        """
        columns = decoding.cut(need.layer) or Cut.whole(decoding.valid)
        length = decoding.valid.shape[1]
        visual = columns.of(decoding.visual)
        if type(need) in STATES:
            with torch.no_grad():
                read = STATES[type(need)](self.model, hidden, kwargs, columns.valid, visual)
            return read if isinstance(need, RowNeed) else columns.spread(read, length)
        layer: Any = self.layers[need.layer]
        rows = READERS[type(need)](layer.self_attn, columns.valid, visual)
        with torch.no_grad(), reading(rows), rows.only():  # as far as its queries and keys
            layer.self_attn(layer.input_layernorm(hidden), **{**kwargs, "past_key_values": None})
        return columns.spread(rows.value(), length)

    @timed("score")
    def _stage(
        self, decoding: Decoding, step: Step, cut: Cut | None, hidden: Tensor
    ) -> tuple[Tensor, Cut | None]:
        """Asks the strategy once per prompt; its copies follow. No cut where nothing leaves."""
        columns = Cut.whole(decoding.valid) if cut is None else cut
        visual = columns.of(decoding.visual)
        # Who counts whole images, as before the language model, chooses from what they count.
        offered = visual if step.strategy.acts_inside else columns.of(decoding.patches)
        asked = [b for b in range(0, len(hidden), decoding.copies) if bool(offered[b].any())]
        spots = {b: offered[b].nonzero()[:, 0] for b in asked}
        chosen = self._decide(decoding, step, columns, hidden, spots)
        stays, merged = columns.valid.clone(), hidden.clone()
        for (b, places), selection in zip(spots.items(), chosen, strict=True):
            slots = own = places[selection.slots[0]]
            if step.positions == "renumber":  # then outputs stand in their order, as before it
                slots = own.sort().values
            for copy in range(b, b + decoding.copies):
                # With the last token made of patches those made of none leave too.
                stays[copy, places if len(slots) else visual[copy].nonzero()[:, 0]] = False
                stays[copy, slots] = True
                merged[copy, slots] = selection.apply(hidden[copy, places][None])[0]
                decoding.move(copy, columns.index[copy, own], columns.index[copy, slots])
            number, row = step.stage.layer or 0, b // decoding.copies
            tokens, kept = int(visual[b].sum()), int((visual & stays)[b].sum())
            made = selection.mix is not None
            decoding.left.append(StageReport(number, row, tokens, kept, made))
        if all(selection.is_identity for selection in chosen):
            return hidden, None
        after = columns.keep(stays, decoding.valid, renumber=step.positions == "renumber")
        return after.gather(merged, columns), after

    def _decide(
        self,
        decoding: Decoding,
        step: Step,
        columns: Cut,
        hidden: Tensor,
        spots: dict[int, Tensor],
    ) -> list[Selection]:
        stages = [n for n, other in self.steps.items() if other.strategy is step.strategy]
        needs = [need for need in step.stage.quantities if isinstance(need, DecoderNeed)]
        later = {b: _after(columns.valid[b], places) for b, places in spots.items()}
        inside = Inside(
            stages.index(step.stage.layer or 0),
            tuple(stages),
            len(self.layers),
            tuple(int(decoding.visual[b].sum()) for b in spots),
            tuple(int(columns.valid[b, : int(places[0])].sum()) for b, places in spots.items()),
            tuple(
                {need: decoding.at(need, b, columns.index[b, places]) for need in needs}
                for b, places in later.items()
            ),
            tuple(tuple(decoding.images[b // decoding.copies]) for b in spots),
        )
        images = Images(
            [hidden[b, places] for b, places in spots.items()],
            [None] * len(spots),
            {
                need: [decoding.at(need, b, columns.index[b, x]) for b, x in spots.items()]
                for need in needs
            },
            None,
            [Selection.all(1, len(places), places.device) for places in spots.values()],
            inside,
        )
        return decide(step, images) if spots else []


def _after(valid: Tensor, places: Tensor) -> Tensor:
    """Returns where the tokens after the last of ``places`` are, ``[M]``."""
    first = int(places[-1]) + 1
    return first + valid[first:].nonzero()[:, 0]


def _device(layer: nn.Module, hidden: Tensor) -> torch.device:
    """The device that a layer computes on; what it is called with may still be on another."""
    device = next(layer.parameters()).device
    return hidden.device if device.type == "meta" else device  # meta: offloaded until it runs


def _to(device: torch.device, value: Any) -> Any:
    """Moves tensors and tuples of them; caches look after themselves."""
    if isinstance(value, tuple):
        return tuple(_to(device, part) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value
