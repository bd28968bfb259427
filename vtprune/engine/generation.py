"""What ``generate`` needs around a shortened prompt, so that callers see their own prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers import __version__ as TRANSFORMERS
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from vtprune.errors import UnsupportedError


def refuse(batch: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for inputs that hide the prompt or continue another one."""
    for name in ("inputs_embeds", "mm_encoder_outputs"):
        if batch.get(name) is not None:
            raise UnsupportedError(
                f"{name} was given to a wrapped model, which must see the prompt's ids and pixels "
                "to shorten it. Pass input_ids and pixel_values, or remove() the handle first."
            )
    cache = batch.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedError(
            f"past_key_values holds {cache.get_seq_length()} tokens; a wrapped model cannot "
            "continue a used cache with new images. Pass the whole conversation without a cache."
        )
    if batch.get("cache_implementation") == "paged":
        raise UnsupportedError("Continuous batching encodes images itself; use generate() instead.")


def refuse_inside(setting_of: Callable[[str], Any]) -> None:
    """Raises UnsupportedError for ways of generating that stages inside the model cannot follow.

    Each would choose anew, or on a part of the prompt, where one choice has to hold.
    """
    ways = {
        "prefill_chunk_size": setting_of("prefill_chunk_size"),
        "use_cache=False": setting_of("use_cache") is False,
        "assistant_model": setting_of("assistant_model") is not None,
        "assistant_early_exit": setting_of("assistant_early_exit"),
        "prompt_lookup_num_tokens": setting_of("prompt_lookup_num_tokens"),
    }
    for name, used in ways.items():
        if used:
            raise UnsupportedError(
                f"{name} does not go with a strategy that acts inside the language model. Leave it "
                "out, or use one that acts before the language model, such as 'divprune'."
            )


def refuse_expansion(copies: int, entries: int, samples: int) -> None:
    """Refuses several sequences per prompt where transformers mixes up a prompt's images.

    Releases before 5.19 repeat each entry of the encoder's output instead of a prompt's group of
    them; there are ``entries`` for ``samples`` prompts with images.
    """
    if copies > 1 and entries > samples and Version(TRANSFORMERS) < Version("5.19"):
        raise UnsupportedError(
            f"transformers {TRANSFORMERS} mixes up the images of a prompt when it makes {copies} "
            "sequences of it. Update: pip install 'transformers>=5.19', or ask for one."
        )


def setting(kwargs: Mapping[str, Any], config: Any, default: Any, name: str) -> Any:
    """Returns a generation setting: the call's, its configuration's, or the model's."""
    for source in (kwargs.get(name), getattr(config, name, None), getattr(default, name, None)):
        if source is not None:
            return source
    return None


def shift_lengths(kwargs: dict[str, Any], default: Any, dropped: int) -> None:
    """Lowers ``max_length`` and ``min_length``, which count the caller's prompt, by ``dropped``."""
    config = kwargs.get("generation_config")
    for kind in ("max", "min"):
        name = f"{kind}_length"
        value = setting(kwargs, config, default, name)
        if value is None or setting(kwargs, config, default, f"{kind}_new_tokens") is not None:
            continue
        value = max(value - dropped, 0)
        if config is not None and kwargs.get(name) is None:
            config = kwargs["generation_config"] = copy.deepcopy(config)
            setattr(config, name, value)
        else:
            kwargs[name] = value


class FullPrompt:
    """Gives user code the ids it knows: the original prompt and what was generated after it."""

    def __init__(self, ids: Tensor, short: int) -> None:
        self.ids, self.short = ids, short

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Returns ``[R, L + t]`` for ``input_ids`` ``[R, L' + t]``, R a multiple of the batch."""
        rows = self.ids.repeat_interleave(len(input_ids) // len(self.ids), dim=0)
        return torch.cat([rows.to(input_ids.device), input_ids[:, self.short :]], dim=1)

    def output(self, result: Any) -> Any:
        """Returns what ``generate`` returned with the original prompt in front."""
        if isinstance(result, Tensor):
            return self(result)
        if isinstance(result, ModelOutput) and "sequences" in result:
            result["sequences"] = self(result["sequences"])
        return result

    def adapt(self, kwargs: dict[str, Any]) -> None:
        """Wraps every user callback among generate's arguments."""
        if kwargs.get("logits_processor"):
            wrapped = [_Processor(p, self) for p in kwargs["logits_processor"]]
            kwargs["logits_processor"] = LogitsProcessorList(wrapped)
        if kwargs.get("stopping_criteria"):
            criteria = [_Criterion(c, self) for c in kwargs["stopping_criteria"]]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            kwargs["prefix_allowed_tokens_fn"] = self._prefix(kwargs["prefix_allowed_tokens_fn"])
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"], self.ids)

    def _prefix(self, allowed: Callable[[int, Tensor], Any]) -> Callable[[int, Tensor], Any]:
        def full(batch_id: int, sent: Tensor) -> Any:
            prompt = self.ids[batch_id].to(sent.device)
            return allowed(batch_id, torch.cat([prompt, sent[self.short :]]))

        return full


class _Processor(LogitsProcessor):
    # transformers reads the arguments of a processor off its signature, so there are exactly two.
    def __init__(self, inner: Callable[..., Any], full: FullPrompt) -> None:
        extra = list(inspect.signature(inner.__call__).parameters)[2:]
        if extra:
            raise UnsupportedError(
                f"{type(inner).__name__} takes {', '.join(extra)} besides ids and scores, which a "
                "wrapped model cannot hand on. Run it on the unwrapped model."
            )
        self.inner, self.full = inner, full

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self.inner(self.full(input_ids), scores)


class _Criterion(StoppingCriteria):
    def __init__(self, inner: Callable[..., Any], full: FullPrompt) -> None:
        self.inner, self.full = inner, full

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.inner(self.full(input_ids), scores, **kwargs)


class _Streamer(BaseStreamer):
    """Hands the streamer the original prompt where generate hands it the short one."""

    def __init__(self, inner: Any, ids: Tensor) -> None:
        self.inner, self.ids, self.started = inner, ids, False

    def put(self, value: Tensor) -> None:
        self.inner.put(value if self.started else self.ids.cpu())
        self.started = True

    def end(self) -> None:
        self.inner.end()
