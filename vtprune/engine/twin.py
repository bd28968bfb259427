"""A second instance of a model over the same weights, which can be wrapped by itself."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from vtprune.engine.instance import live


def twin(model: PreTrainedModel) -> Any:
    """Returns an unwrapped instance with the modules of ``model``, which may be wrapped.

    What a call leaves on a model, such as the position offset of Qwen, it leaves on the model and
    its base: the twin has both of its own, and its own ``generation_config``. All that has weights
    is shared, so it costs no memory.
    """
    other = _alike(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    prefix = model.base_model_prefix
    if prefix in other._modules:
        other._modules[prefix] = _alike(other._modules[prefix])
    if any(handle.model is model for handle in live):
        for name in ("forward", "generate"):
            _unwrap(model, other, name)
    return other


def _alike(module: Any) -> Any:
    """Returns a module with the same children, but with hooks of its own."""
    other = copy.copy(module)
    own = {name: copy.copy(held) for name, held in vars(module).items() if isinstance(held, dict)}
    vars(other).update(own)
    return other


def _unwrap(model: PreTrainedModel, other: Any, name: str) -> None:
    """Gives ``other`` what ``model`` had under ``name`` before it was wrapped."""
    before = vars(model)[name].__wrapped__
    if getattr(before, "__self__", None) is model:  # of the class: the twin has it too
        vars(other).pop(name)
    else:
        vars(other)[name] = before
