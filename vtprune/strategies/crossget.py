"""CrossGET: in every block merge any two patches, as a token that guides them thinks best.

Between attention and MLP patches are ranked by how much they resemble any other, and each may merge
into one that comes later in that order, so that those most alike never leave together. Those merge
that are well made up for and of little importance to the guide, into the most similar patch that is
left, the more important one counting more in the mean. ICML 2024, arXiv 2305.17455
(sdc17/CrossGET). In a ViT by itself keys of all heads side by side are compared, importance is the
cosine with the query of a guide, and that is a second [CLS], or with trained ``tokens`` one that
learned across modalities; it leaves in the end. In the tower of a language model keys are means
over heads, and importance is the attention that a patch receives plus that of [CLS], as in the
official code for LLaVA, where the guide takes the place of [CLS] and stays among the patches.
Without a [CLS] the mean query guides. The rest of the tower, the projector and the prefill run on
fewer tokens, which get attention for all patches they stand for. Every block merges equally many,
so that ``keep`` is met exactly, repeatedly where halving is not enough. Where a visual token is
made of several patches, projected tokens are merged in one go. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.scoring.complete import merge_guided
from vtprune.strategies._blocks import InBlocks
from vtprune.trained import Trained
from vtprune.types import (
    ClsRow,
    Facts,
    Guidance,
    Keys,
    Maps,
    Received,
    Selection,
    Signals,
    Stage,
    TowerNeed,
    WideKeys,
)

TRAIN = (
    "Train some with 'vtprune train crossget --model MODEL --out FILE', or leave tokens= out for a "
    "second [CLS]."
)
CROSS = Trained("tokens", "crossget_tokens.safetensors", TRAIN)


@dataclass(frozen=True)
class CrossGET(InBlocks):
    """``layers`` are the blocks that merge, by default all up to the one that yields the features.

    ``metric``: keys of all heads side by side (``wide``) and the cosine with the guide, or ``mean``
    keys and attention; by default the former in a ViT by itself. ``tokens``: what the guide gets
    added before each block, ``[blocks, width]``: a file, a folder that holds it, the name of a
    shipped model, or a tensor; by default that of the folder that the model was loaded from, if
    any; zeros = a second [CLS].
    """

    metric: Literal["wide", "mean"] | None = None
    tokens: str | Tensor | None = None

    def __post_init__(self) -> None:
        if self.metric not in (None, "wide", "mean"):
            raise ConfigError(f"metric={self.metric!r} is unknown; choose wide or mean.")
        if self.tokens is not None and self.metric == "mean":
            raise ConfigError("tokens= guide by wide keys; leave metric='mean' out.")

    def beside(self, folder: str) -> CrossGET:
        if self.tokens is not None or self.metric == "mean":
            return self
        return replace(self, tokens=CROSS.beside(folder))

    def wide(self, facts: Facts) -> bool:
        """Returns whether keys of all heads are compared, side by side."""
        if self.metric is None:
            return facts.signals >= {Maps, Guidance}  # a ViT by itself, where a guest may guide
        return self.metric == "wide"

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        if self.wide(facts):
            return WideKeys(layer), Guidance(layer)
        both = Keys(layer), Received(layer)
        return (*both, ClsRow(layer)) if facts.has_cls else both

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        if self.tokens is not None and not self._has_guide(facts):
            raise UnsupportedError(
                f"tokens={_named(self.tokens)} guide in a ViT by itself that has a [CLS]; "
                f"{facts.family} is none. Leave them out."
            )
        return super().plan(facts)

    def _has_guide(self, facts: Facts) -> bool:
        return facts.has_cls and Maps in facts.signals and self.wide(facts)

    def guests(self, facts: Facts) -> Tensor | None:
        if not self._has_guide(facts):
            return None
        if self.tokens is None:
            return torch.zeros(facts.vision_layers, 1)
        tokens = load(self.tokens)
        blocks, width = tokens.shape
        if blocks != facts.vision_layers or width != facts.width:
            raise ConfigError(
                f"tokens={_named(self.tokens)} are for {blocks} blocks of width {width}; "
                f"{facts.family} has {facts.vision_layers} of width {facts.width}. {TRAIN}"
            )
        return tokens

    def select(self, signals: Signals, k: int) -> Selection:
        if any(isinstance(need, WideKeys) for need in signals.values):
            metric = signals.stack(WideKeys)[-1]  # [B, N, H * d]
            importance = signals.stack(Guidance)[-1]
        else:
            metric = signals.stack(Keys)[-1]  # [B, N, d]
            importance = signals.stack(Received)[-1]
            if any(isinstance(need, ClsRow) for need in signals.values):
                importance = importance + signals.stack(ClsRow)[-1]
        size = signals.size
        if size is None:
            size = torch.ones(metric.shape[:2], device=metric.device)
        return merge_guided(metric, importance, size, k).selection()


def load(source: str | Tensor) -> Tensor:
    """Returns the tokens ``[L, C]`` float32 of a name, or given ones, as they are.

    Raises:
        ConfigError: there is no such file, or there are no such tokens.
    """
    tokens = source if isinstance(source, Tensor) else CROSS.tensors(source).get("tokens")
    if tokens is None or tokens.ndim != 2 or not tokens.is_floating_point():
        raise ConfigError(f"tokens={_named(source)}: no 'tokens' [blocks, width]. {TRAIN}")
    return tokens.float()


def _named(source: str | Tensor) -> str:
    return str(list(source.shape)) if isinstance(source, Tensor) else repr(source)
