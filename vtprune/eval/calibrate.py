"""What strategies that compute less have to know of a model: which layers, and which heads, matter.

ShortV replaces the layers first that contribute least to the next token; YOPO keeps the heads that
look at images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.inputs import visual
from vtprune.engine.plan import find_adapter, wrap
from vtprune.errors import ConfigError
from vtprune.eval import shipped
from vtprune.eval.results import write_whole
from vtprune.eval.samples import Asker, find_tasks
from vtprune.scoring.contribution import (
    contribution,
    heads_that_look,
    order_of,
    visual_share,
)

Inputs = Mapping[str, Tensor]
FIRST = 900_000  # sample; far behind those that a sweep measures


@torch.no_grad()
def layer_contributions(
    model: Any, batches: Iterable[Inputs], advance: Callable[[int], None] = lambda n: None
) -> Tensor:
    """Returns what each layer of the language model contributes for visual tokens, ``[L]``.

    The mean, over all rows, of the divergence of the next token's probabilities when visual rows
    stay frozen in that layer alone from those of the whole model, in nats.

    Args:
        batches: left-padded prompts with their pixels.
        advance: told the rows that a layer is done with.
    """
    depth = len(find_adapter(model).decoder)
    sums, rows = torch.zeros(depth), 0
    for inputs in batches:
        whole = model(**inputs).logits[:, -1]
        rows += len(whole)
        for layer in range(depth):
            with wrap(model, "shortv", layers=(layer,)):
                changed = model(**inputs).logits[:, -1]
            sums[layer] += contribution(changed, whole).sum().cpu()
            advance(len(whole))
    return sums / rows


class _Shares:
    """Reads how much each head of each layer attends to visual tokens, from the last token."""

    def __init__(self, modules: Sequence[nn.Module], seen: Tensor, valid: Tensor) -> None:
        self.modules, self.seen, self.valid = list(modules), seen, valid
        self.found: dict[int, Tensor] = {}

    def reads(self, module: nn.Module) -> bool:
        """Returns whether it is one of the language model's."""
        return module in self.modules

    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
    ) -> None:
        """Takes the shares of the key/value heads, ``[B, Hkv]``, each the mean of its queries'."""
        k = k[:, :, : q.shape[2]].repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
        scores = (q[:, :, -1:].float() @ k.mT)[:, :, 0] * (scale or q.shape[-1] ** -0.5)
        hidden = ~self.valid[:, None].to(q.device)
        rows = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        share = visual_share(rows, self.seen.to(q.device))
        groups = share.shape[1] // _kv_heads(module)
        self.found[self.modules.index(module)] = share.unflatten(1, (-1, groups)).mean(-1).cpu()


def _kv_heads(module: Any) -> int:
    return module.config.num_key_value_heads


@torch.no_grad()
def head_shares(model: Any, batches: Iterable[Inputs]) -> Tensor:
    """Returns how much each head looks at images, ``[S, L, Hkv]``, of all rows S of the batches.

    The ratio of the last prompt token's attention to visual tokens to that to all others.
    """
    adapter = find_adapter(model)
    layers: Any = adapter.decoder
    modules = [layer.self_attn for layer in layers]
    implementation = adapter.language_model.config._attn_implementation or "eager"
    every = []
    tap.install(implementation)
    try:
        for inputs in batches:
            ids = inputs["input_ids"]
            shares = _Shares(modules, visual(adapter, ids), inputs["attention_mask"].bool())
            with tap.reading(shares):
                model(**inputs)
            every.append(torch.stack([shares.found[i] for i in range(len(modules))], dim=1))
    finally:
        tap.uninstall(implementation)
    return torch.cat(every)


def head_masks(model: Any, batches: Iterable[Inputs], alpha: float) -> tuple[tuple[int, ...], ...]:
    """Returns the heads that YOPO keeps, per layer; ``alpha`` as ``heads_that_look`` takes it."""
    return heads_that_look(head_shares(model, batches), alpha)


def calibrate_shortv(
    name: str,
    out: Path,
    *,
    task: str,
    limit: int,
    batch_size: int,
    device: str = "cpu",
    dtype: str = "float32",
    advance: Callable[[int], None] = lambda n: None,
) -> list[tuple[int, float]]:
    """Measures the layers of a model on ``limit`` samples and writes their order to ``out``.

    In a model's own folder, as ``shortv.json``, ``shortv`` finds it by itself.

    Args:
        name: of the model; it, ``device`` and ``dtype`` are as ``shipped.load`` takes them.

    Returns:
        Each layer and its contribution, the first to be replaced first.

    Raises:
        ConfigError: no such task or model, or no folder to write to.
    """
    (found,) = find_tasks([task])
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")
    model, processor = shipped.load(name, device, dtype)
    ask = Asker(processor)

    def batches() -> Iterable[Inputs]:
        for first in range(FIRST, FIRST + limit, batch_size):
            samples = found.load(first, min(first + batch_size, FIRST + limit))
            inputs = ask([s.question for s in samples], [s.image for s in samples])
            yield {key: value.to(model.device) for key, value in inputs.items()}

    made = layer_contributions(model, batches(), advance)
    order = order_of(made)
    said = {
        "strategy": "shortv",
        "model": name,
        "fingerprint": shipped.fingerprint(model, processor),
        "task": task,
        "samples": limit,
        "order": order,
        "contribution": [float(made[layer]) for layer in order],
    }
    write_whole(out, json.dumps(said, indent=2) + "\n")
    return [(layer, float(made[layer])) for layer in order]
