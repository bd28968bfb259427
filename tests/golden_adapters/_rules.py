"""A recorded language model with row rules in its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from vtprune.engine import tap
from vtprune.engine.computing import Computing
from vtprune.engine.decoding import Decoding
from vtprune.engine.layers import Layers
from vtprune.types import RowRule


@contextmanager
def ruled(
    model: LlamaModel,
    rules: Mapping[int, RowRule],
    visual: Tensor,
    places: Tensor | None = None,
) -> Iterator[None]:
    """Runs the model with the rules; ``visual`` ``[B, L]`` bool marks the image."""
    images = visual.sum(1, keepdim=True).tolist()
    decoding = Decoding(torch.ones_like(visual), visual, visual, images)
    decoding.where = None if places is None else lambda: places
    computing = Computing(list(model.layers), rules, lambda: decoding)
    with ExitStack() as undo:
        tap.install("sdpa")
        undo.callback(tap.uninstall, "sdpa")
        Layers(model, list(model.layers), [], lambda: decoding).install(undo)
        computing.install(undo)
        with torch.no_grad(), tap.changing(computing):
            yield


@contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Records what each module is given, and what it gives, in its last call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = given, output[0] if isinstance(output, tuple) else output

        return after

    with ExitStack() as undo:
        for name, module in modules.items():
            hook = module.register_forward_hook(record(name), with_kwargs=True)
            undo.callback(hook.remove)
        yield seen
