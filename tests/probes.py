"""What several tests look at a model with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.types import Facts, Need, Signals, Strategy


@dataclass(frozen=True)
class Spy(Strategy):
    """Keeps the received signals for the test to look at."""

    wanted: tuple[Need, ...] = ()
    seen: list[Signals] = field(default_factory=list)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return self.wanted

    def score(self, signals: Signals) -> Tensor:
        self.seen.append(signals)
        return signals.tokens.norm(dim=-1)


def generate(
    model: Any, inputs: Mapping[str, Any], n: int = 10, **options: Any
) -> tuple[Tensor, Tensor]:
    """Returns the new ids ``[B, n]`` and their logits ``[B, n, V]``, greedily."""
    out = model.generate(
        **inputs,
        max_new_tokens=n,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
