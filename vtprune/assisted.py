"""Assisted decoding: a wrapped model drafts what another one, which sees every token, confirms.

The draft reads a shortened prompt; the target accepts the tokens that it would have chosen itself,
so that its greedy output stays what it is. Verification, rollback of the target's cache and the
number of proposals are transformers' own ``generate(assistant_model=...)``; the draft stands in
there with a prompt and a cache of its own. After arXiv 2509.15235 (ViSpec), without training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.utils.generic import ModelOutput

from vtprune.engine.instance import live
from vtprune.engine.twin import twin
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, InputError, UnsupportedError

__all__ = ["Assisted", "generate", "twin"]


@dataclass(frozen=True)
class Assisted:
    """What ``generate`` returned, and what the draft was good for.

    Attributes:
        output: as the target's ``generate`` returns it.
        proposed, accepted: tokens of the draft, and those of them that are in the output.
        target_forwards, new_tokens: calls of the target, and tokens that they gave.
    """

    output: Any
    proposed: int
    accepted: int
    target_forwards: int
    new_tokens: int

    @property
    def acceptance(self) -> float:
        """The share of what was proposed that is in the output; NaN where nothing was."""
        return self.accepted / self.proposed if self.proposed else float("nan")


def generate(
    target: PreTrainedModel,
    draft: Handle,
    batch: Mapping[str, Any],
    *,
    draft_batch: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Assisted:
    """Generates with ``target``, which checks what a wrapped model proposes.

    Greedy output is that of ``target.generate(**batch, **settings)``; samples have its
    distribution. How many tokens are proposed at a time is said by the draft's
    ``model.generation_config`` (``num_assistant_tokens`` and its neighbours).

    Args:
        target: a model that may be wrapped itself; its output is then that of the wrapped one.
        draft: what ``wrap`` returned for another model of the same tokenizer: a smaller one of
            the family, or ``twin(target)``. Its strategy must act before the language model.
        batch: the inputs of one prompt, without padding.
        draft_batch: those of the same prompt for the draft, where its processor makes others.
        settings: of ``generate``.

    Raises:
        ConfigError: the handle was removed, or is the target's own.
        InputError: several prompts, or padding.
        UnsupportedError: other vocabularies, or a strategy inside the language model.
    """
    own = batch if draft_batch is None else draft_batch
    _check(target, draft, (batch, own))
    proposing, model, calls = _Draft(draft, own), cast(Any, target), []
    hook = target.register_forward_hook(lambda *_: calls.append(1))
    try:
        output = model.generate(**batch, assistant_model=proposing, **settings)
    finally:
        hook.remove()
    ids = output if isinstance(output, Tensor) else output["sequences"]
    new = ids[0, batch["input_ids"].shape[1] :].tolist()
    rounds = proposing.rounds
    accepted = sum(_alike(tokens, new[at:]) for at, tokens in rounds)
    proposed = sum(len(tokens) for _, tokens in rounds)
    return Assisted(output, proposed, accepted, len(calls), len(new))


def _check(target: PreTrainedModel, draft: Handle, batches: Iterable[Mapping[str, Any]]) -> None:
    if draft not in live:
        raise ConfigError("The draft's handle was removed; give one that vtprune.wrap returned.")
    if any(module is draft.model for module in target.modules()):
        raise ConfigError(
            "The draft is the target itself, which would be shortened too. Wrap another model of "
            "its tokenizer, or vtprune.assisted.twin(target), which shares its weights."
        )
    if draft.acts_inside:
        raise UnsupportedError(
            "The draft's strategy acts inside the language model, where rejected tokens cannot be "
            "taken back. Use one that acts before the language model, such as 'divprune'."
        )
    ours, theirs = (m.config.get_text_config().vocab_size for m in (target, draft.model))
    if ours != theirs:
        raise UnsupportedError(
            f"The target knows {ours} tokens and the draft {theirs}; both must be of one "
            "tokenizer. Draft with a model of the target's family, or with twin(target)."
        )
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None or len(ids) != 1 or (mask is not None and not bool(mask.all())):
            shape = None if ids is None else list(ids.shape)
            raise InputError(
                f"input_ids are {shape}; assisted decoding takes one prompt at a time, [1, L] "
                "without padding."
            )


class _Draft:
    """As much of a model as transformers asks of an assistant.

    Attributes:
        rounds: how many tokens were generated before each proposal, and the proposal.
    """

    def __init__(self, handle: Handle, batch: Mapping[str, Any]) -> None:
        model: Any = handle.model
        self._handle = handle
        self.model, self.config, self.device = model, model.config, model.device
        self.generation_config = copy.deepcopy(model.generation_config)
        self.rounds: list[tuple[int, list[int]]] = []
        self._batch = {
            k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        self._before: int | None = None  # tokens of the target's prompt
        self._cache: Any = None
        self._first = 0  # position of the first generated token
        self._seen: list[int] = []  # generated tokens in the cache

    def _supports_logits_to_keep(self) -> bool:
        return self.model._supports_logits_to_keep()

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        generation_config: Any,
        logits_processor: Any = (),
        **for_the_target: Any,
    ) -> ModelOutput:
        """Proposes up to ``max_new_tokens`` after ``input_ids`` ``[1, L]``, the target's."""
        if self._before is None:
            self._before = input_ids.shape[1]
        start = input_ids.shape[1]
        processors: Any = LogitsProcessorList(logits_processor)
        scores: list[Tensor] = []
        end = generation_config.eos_token_id
        ends = torch.tensor([] if end is None else end, device=self.device).view(-1)
        least = generation_config.assistant_confidence_threshold or 0.0
        while len(scores) < max_new_tokens:
            logits = self._next(input_ids[0, self._before :].tolist())
            scores.append(processors(input_ids, logits.to(torch.float32, copy=True)))
            chances = scores[-1].softmax(-1)
            token = scores[-1].argmax(-1, keepdim=True)
            if generation_config.do_sample:
                token = torch.multinomial(chances, 1)
            input_ids = torch.cat([input_ids, token], dim=1)
            if bool((token == ends).any()) or float(chances.gather(1, token)) < least:
                break
        self.rounds.append((start - self._before, input_ids[0, start:].tolist()))
        return ModelOutput(sequences=input_ids, scores=tuple(scores), past_key_values=None)

    def _next(self, generated: list[int]) -> Tensor:
        """Returns the logits ``[1, V]`` after what is generated; forgets what was rejected."""
        if self._cache is None:
            last = {"logits_to_keep": 1} if self._supports_logits_to_keep() else {}
            out = self.model(**self._batch, use_cache=True, **last)
            self._cache = out.past_key_values
            positions = self._handle.adapter.positions(self._batch, self._batch["input_ids"])
            self._first = int(positions[-3:].amax()) + 1  # of three axes, or of the one row
            if not generated:
                return out.logits[:, -1]
        # At least one token is fed, since only what is fed has logits.
        common = min(_alike(self._seen, generated), len(generated) - 1)
        rejected = len(self._seen) - common
        if rejected:
            self._cache.crop(-rejected)
        self._seen = generated
        ids = torch.tensor([generated], device=self.device)
        place = self._first + torch.arange(len(generated), device=self.device)[None]
        out = self.model(
            input_ids=ids[:, common:],
            position_ids=place[:, common:],
            attention_mask=ids.new_ones(1, self._batch["input_ids"].shape[1] + len(generated)),
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1]


def _alike(one: list[int], other: list[int]) -> int:
    """Returns how many numbers both begin with."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return next((at for at, equal in enumerate(same) if not equal), min(len(one), len(other)))
