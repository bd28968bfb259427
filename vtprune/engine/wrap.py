"""``wrap``: plan a strategy for a model, install it on this one instance, undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from vtprune.engine import tap
from vtprune.engine.compaction import Prompt, compact, rows_of, shorten
from vtprune.engine.decoding import Decoding
from vtprune.engine.encoder import encode
from vtprune.engine.evicting import Evicting
from vtprune.engine.generation import (
    FullPrompt,
    refuse,
    refuse_expansion,
    refuse_inside,
    setting,
    shift_lengths,
)
from vtprune.engine.inputs import given, has_visuals, valid_tokens, visual
from vtprune.engine.instance import bound, refuse_overlap, restore
from vtprune.engine.instance import live as _live
from vtprune.engine.instruction import instructions
from vtprune.engine.intervening import Intervening
from vtprune.engine.items import Item
from vtprune.engine.layers import Layers
from vtprune.engine.measure import Measured
from vtprune.engine.positions import Continuation
from vtprune.engine.report import Report
from vtprune.engine.signals import Step
from vtprune.engine.summary import report_of
from vtprune.engine.text_tower import TextTower
from vtprune.engine.timing import Clock, timing
from vtprune.errors import UnsupportedError
from vtprune.types import Newlines, Positions, Selection, Site
from vtprune.vlm_adapters._base import VLMAdapter


@dataclass(frozen=True)
class _Call:
    """The running call of a handle; ``gaps`` says that its position ids have holes."""

    handle: Handle
    gaps: bool
    decoding: Decoding | None


_running: ContextVar[_Call | None] = ContextVar("vtprune_call", default=None)


class Handle:
    """A wrapped model. ``remove()`` (or leaving the ``with`` block) gives the original back.

    Attributes:
        selections: the last call's selection per image, each with a batch dimension of 1.
        index: the last call's ``[B, L']`` map from the shortened prompt to the caller's, -1 =
            padding; logits of a direct ``model(**batch)`` have this length.
        timing: set to True to measure the phases of every call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: VLMAdapter,
        steps: Sequence[Step],
        processor: Any = None,
        newlines: Newlines = "keep",
        text_tower: TextTower | None = None,
    ) -> None:
        refuse_overlap(model)
        self.model, self.adapter, self.steps = model, adapter, tuple(steps)
        self.newlines: Newlines = newlines
        self.outside = [s for s in self.steps if s.stage.site is not Site.DECODER]
        decoding = [s for s in self.steps if s.stage.site is Site.DECODER]
        self.inside = [s for s in decoding if s.stage.lets_leave]
        self._intervening = Intervening(adapter.decoder, decoding, self._current)
        self._computing = self._intervening.inner
        self._evicting = Evicting(adapter.decoder, decoding, self._current, self._intervening)
        self.positions: Positions = self.outside[-1].positions if self.outside else "keep"
        self.timing = False
        self.selections: list[Selection] = []
        self.index: Tensor | None = None
        self._processor, self._text_tower = processor, text_tower
        self._items: Sequence[Item] = ()
        self._prompt: Prompt | None = None
        self._decoding: Decoding | None = None
        self._measured = Measured()
        self._undo = ExitStack()
        with ExitStack() as undo:  # a failure half-way leaves nothing behind
            self._install(undo)
            self._undo = undo.pop_all()
        _live.add(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes everything off the model; a second call does nothing."""
        self._undo.close()
        _live.discard(self)

    def report(self) -> Report:
        """Returns what the last call kept, per image, and what is known of its costs."""
        return report_of(self)

    def encode(self, batch: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Selection]]:
        """Encodes what is seen in ``batch``, and no more: what is left per modality, and of what.

        Returns:
            The outputs that the language model would get, and a selection per image or video.
        """
        self._forget()
        outputs, _ = self._encode(batch, valid_tokens(batch, None))
        return outputs, self.selections

    @property
    def acts_inside(self) -> bool:
        """Whether something happens inside the language model."""
        return bool(self.inside or self._intervening.acts or self._evicting.steps)

    @property
    def final(self) -> Tensor | None:
        """Columns of the caller's prompt that leave the last decoder layer, ``[B, n]``.

        Of the last call, ascending, -1 = padding; None before the first one.
        """
        if self._prompt is None:
            return None
        index, cut = self._prompt.index, self._decoding.final() if self._decoding else None
        if cut is None:
            return index
        copies = len(cut.index) // len(index)  # beams, or several sequences per prompt
        left = cut.index[::copies].to(index.device)
        return index.gather(1, left.clamp(min=0)).masked_fill(left < 0, -1)

    def _install(self, undo: ExitStack) -> None:
        language_model = self.adapter.language_model
        towers = [self.adapter.tower(modality) for modality in self.adapter.modalities]
        for part in (*towers, language_model):
            implementation = part.config._attn_implementation or "eager"
            tap.install(implementation)
            undo.callback(tap.uninstall, implementation)
        hook = language_model.register_forward_pre_hook(self._fill_mask, with_kwargs=True)
        undo.callback(hook.remove)
        undo.callback(language_model.register_forward_hook(self._measure).remove)
        if self.acts_inside:
            decoder = self.adapter.decoder
            forgetting = (*self._computing.choosing, *self._evicting.steps)
            layers = Layers(language_model, decoder, self.inside, self._current, forgetting)
            layers.install(undo)
            self._intervening.install(undo)
            self._evicting.install(undo)
        for name, replacement in (("generate", self._generate), ("forward", self._forward)):
            undo.callback(restore(self.model, name))
            original = getattr(self.model, name)
            setattr(self.model, name, bound(original, replacement))

    # -- calls ---------------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], batch: dict[str, Any]) -> Any:
        refuse(batch)
        if batch.get("inputs") is not None:
            batch["input_ids"] = batch.pop("inputs")
        batch.pop("inputs", None)
        self._forget()
        if not has_visuals(self.adapter, batch):
            return original(**batch)
        if self.acts_inside:
            refuse_inside(lambda name: self._setting(batch, name))
        with torch.no_grad():
            valid = valid_tokens(batch, self._padding(batch))
            encoded, prompt = self._encode(batch, valid)
            short = self._encoded(batch, encoded)
            copies = [self._setting(batch, f"num_{what}") for what in ("beams", "return_sequences")]
            entries = sum(len(output.pooler_output) for output in encoded.values())
            refuse_expansion(max(n or 1 for n in copies), entries, len(set(prompt.sample)))
            if prompt.changed:
                positions = batch.get("position_ids")
                if positions is None:
                    prepare: Any = self.model._prepare_position_ids_for_generation
                    known = {k: v for k, v in short.items() if k != "input_ids"}
                    positions = prepare(prompt.ids, {**known, "attention_mask": valid.long()})
                short = self._compact(prompt, short, positions)
                shift_lengths(short, self.model.generation_config, prompt.length - prompt.short)
                full = FullPrompt(prompt.ids, prompt.short)
                full.adapt(short)
                return full.output(self._run(original, short, prompt))
        return self._run(original, short, prompt)

    def _forward(self, original: Callable[..., Any], batch: dict[str, Any]) -> Any:
        call = _running.get()
        if call is not None and call.handle is self:
            return original(**batch)
        if not given(self.adapter, batch) and batch.get("past_key_values") is not None:
            return self._resume(original, batch)
        self._forget()
        if not has_visuals(self.adapter, batch):
            return original(**batch)
        refuse(batch)
        if self.inside and batch.get("labels") is not None:
            raise UnsupportedError(
                "labels have no counterpart where tokens leave inside the language model. Compute "
                "the loss from the logits; handle.index says which tokens they belong to."
            )
        encoded, prompt = self._encode(batch, valid_tokens(batch, None))
        short = self._encoded(batch, encoded)
        if not prompt.changed:
            positions = self.adapter.positions(batch, prompt.ids)
            return self._prefill(original, short, prompt, positions, positions)
        if isinstance(batch.get("logits_to_keep"), Tensor):
            raise UnsupportedError(
                "logits_to_keep as a tensor names positions of the full prompt; pass a number, or "
                "pick rows of the logits through handle.index."
            )
        positions = self.adapter.positions(batch, prompt.ids)
        short = self._compact(prompt, short, positions)
        return self._prefill(original, short, prompt, positions, short["position_ids"])

    def _prefill(
        self,
        original: Callable[..., Any],
        batch: dict[str, Any],
        prompt: Prompt,
        positions: Tensor,
        shortened: Tensor,
    ) -> Any:
        """Runs a direct call; what a decode loop needs later rides on the cache it returns."""
        result = self._run(original, batch, prompt)
        decoding = self._decoding
        cut = None if decoding is None else decoding.final()
        if cut is not None:
            self.index = self.final
        acts = decoding is not None and bool(decoding.held or decoding.marks)
        if not prompt.changed and cut is None and not acts:
            return result
        for value in result.values() if isinstance(result, Mapping) else result:
            if isinstance(value, Cache):
                after = Continuation.after(prompt.index, positions, shortened)
                value._vtprune = after, decoding  # type: ignore[attr-defined]
        return result

    def _resume(self, original: Callable[..., Any], batch: dict[str, Any]) -> Any:
        """One step of a decode loop that the caller runs."""
        cache = batch["past_key_values"]
        after, decoding = getattr(cache, "_vtprune", (None, None))
        if after is None or batch.get("input_ids") is None:
            return original(**batch)
        resumed = after.resume(batch, cache.get_seq_length())
        return self._call(original, resumed, _Call(self, False, decoding))

    def _run(self, original: Callable[..., Any], batch: dict[str, Any], prompt: Prompt) -> Any:
        gaps = prompt.changed and self.positions == "keep"
        if self.acts_inside:
            seen = visual(self.adapter, prompt.ids)
            self._decoding = Decoding.of(prompt, seen, self._items, self._features)
        with timing(self._measured.clock, "language"):
            return self._call(original, batch, _Call(self, gaps, self._decoding))

    def _call(self, original: Callable[..., Any], batch: dict[str, Any], call: _Call) -> Any:
        token = _running.set(call)
        try:
            with tap.changing(self._evicting):
                return original(**batch)
        finally:
            _running.reset(token)

    def _current(self) -> Decoding | None:
        call = _running.get()
        return call.decoding if call is not None and call.handle is self else None

    # -- parts of a call -----------------------------------------------------------------------

    def _forget(self) -> None:
        """Begins a call: the report is of this one, not of the last with images."""
        self.selections, self._prompt, self.index = [], None, None
        self._items, self._features, self._decoding = (), {}, None
        self._measured = Measured(Clock(self.model.device) if self.timing else None)

    def _encode(self, batch: Mapping[str, Any], valid: Tensor) -> tuple[Any, Prompt]:
        ids = batch["input_ids"]
        with timing(self._measured.clock, "encode"):
            reads_text = any(step.stage.reads_text for step in self.outside)
            text = self._text(ids, valid) if reads_text else None
            tower = self._text_tower
            needs = self._intervening.needs
            encoded = encode(self.adapter, self.outside, batch, text, self.newlines, tower, needs)
            prompt = shorten(ids, valid, encoded.items, encoded.selections)
        self.selections, self._items = encoded.selections, encoded.items
        self._features = encoded.features
        self._prompt, self.index, self._measured.tiles = prompt, prompt.index, encoded.tiles
        return encoded.outputs, prompt

    def _encoded(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
        pixels = {name for modality in self.adapter.modalities for name in modality.pixels}
        rest = {k: v for k, v in batch.items() if k not in pixels}
        return {**rest, "mm_encoder_outputs": dict(outputs)}

    def _text(self, ids: Tensor, valid: Tensor) -> Callable[[Sequence[Item]], list[Tensor]]:
        def per_item(items: Sequence[Item]) -> list[Tensor]:
            asked = instructions(ids, valid, visual(self.adapter, ids), self._processor)
            if self._text_tower is None:
                texts = [self.model.get_input_embeddings()(words) for words in asked]
            else:
                decode = self._processor.tokenizer.decode
                texts = self._text_tower.words([decode(words.tolist()) for words in asked])
            return [texts[row] for row in rows_of(ids, items)]

        return per_item

    def _compact(self, prompt: Prompt, batch: dict[str, Any], positions: Tensor) -> dict[str, Any]:
        with timing(self._measured.clock, "compact"):
            return compact(prompt, batch, positions, self.positions, self._pad_id(batch))

    def _setting(self, batch: Mapping[str, Any], name: str) -> Any:
        config, default = batch.get("generation_config"), self.model.generation_config
        return setting(batch, config, default, name)

    def _padding(self, batch: Mapping[str, Any]) -> int | None:
        """The id that ``generate`` takes for padding when it is given no mask."""
        pad, eos = (self._setting(batch, f"{name}_token_id") for name in ("pad", "eos"))
        ends = eos if isinstance(eos, list) else [eos]
        return None if pad in ends else pad

    def _pad_id(self, batch: Mapping[str, Any]) -> int:
        return self._setting(batch, "pad_token_id") or 0

    def _fill_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Without cache and mask, gapped position ids would be read as packed sequences."""
        call = _running.get()
        alone = kwargs.get("past_key_values") is None and kwargs.get("attention_mask") is None
        if call is None or call.handle is not self or not call.gaps or not alone:
            return None
        ones = torch.ones(kwargs["inputs_embeds"].shape[:2], device=kwargs["inputs_embeds"].device)
        return args, {**kwargs, "attention_mask": ones.long()}

    def _measure(self, module: nn.Module, args: Any, output: Any) -> None:
        call = _running.get()
        if call is not None and call.handle is self:
            self._measured.look(output, self._prompt, self.adapter.language_model.config)
