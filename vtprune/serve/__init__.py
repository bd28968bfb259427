"""Serving pruned visual tokens: inputs for vLLM, and a plug-in that prunes inside its engine.

Nothing here imports vllm but the modules that its plug-in loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.serve.inputs import VLLMInputs, to_vllm_inputs

__all__ = ["VLLMInputs", "to_vllm_inputs"]


def __getattr__(name: str) -> object:  # the plug-in's processes need none of it
    if name not in __all__:
        raise AttributeError(f"module 'vtprune.serve' has no attribute {name!r}")
    from vtprune.serve import inputs

    return getattr(inputs, name)
