"""YOPO: visual tokens see their neighbours alone, in some heads, and nobody in the later layers.

The visual computation of a model is redundant in the same places for all images: far neighbours,
many heads, hidden neurons, and the later layers. arXiv 2410.06169 (ZhangAIPI/YOPO_MLLM_Pruning). As
in the official code windows and heads are only hidden; neurons, and values that nobody reads, are
not computed. From ``layercut`` on, text loses the attention that visual tokens got; it is shared
out with ``renorm``, as in the official code for Qwen2-VL, and then all visual tokens leave there,
with their keys and values. A head is a key/value head here, with all queries that share it. The
authors train LLaVA with ``mlp_ratio=2`` and head masks. Defaults: ours, official where none is
trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.errors import ConfigError
from vtprune.strategies._compute import Compute
from vtprune.types import Budget, Facts, RowRule, Signals, Site, Stage


@dataclass(frozen=True)
class YOPO(Compute):
    """``window`` x ``window`` visual tokens are seen by each, by an even one as by one less.

    ``layercut`` is the layer from which on nobody reads visual tokens, by default 16 of 32; with
    ``renorm`` they leave before it. ``mlp_ratio`` is by how much fewer hidden neurons they pass.
    ``heads`` holds of each layer of the model the key/value heads that they have. A window or heads
    of None are all.
    """

    window: int | None = 5
    layercut: int | None = None
    renorm: bool = False
    mlp_ratio: float = 1.0
    heads: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window} sees nothing; give 1 or more, or None.")
        if not self.mlp_ratio >= 1:
            raise ConfigError(f"mlp_ratio={self.mlp_ratio!r} must be at least 1.")
        if self.layercut is not None and self.layercut < 0:
            raise ConfigError(f"layercut={self.layercut} is no layer; give 0 or more.")

    def rule(self, layer: int, facts: Facts) -> RowRule:
        if self.heads is not None and len(self.heads) != facts.decoder_layers:
            raise ConfigError(
                f"heads= has {len(self.heads)} layers; {facts.family} has {facts.decoder_layers}. "
                "Give the kept heads of each."
            )
        return RowRule(
            attend="all" if self.window is None else "window",
            mlp=1 / self.mlp_ratio,
            radius=((self.window or 1) - 1) // 2,
            heads=None if self.heads is None else self.heads[layer],
            read=layer < self.cut(facts),
        )

    def cut(self, facts: Facts) -> int:
        """Returns the layer from which on nobody reads visual tokens."""
        return facts.scale_decoder(16, 32) if self.layercut is None else self.layercut

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        stages, cut = super().plan(facts), self.cut(facts)
        if not self.renorm:
            return stages
        first, last = facts.first_stage, facts.decoder_layers - 1
        if not first <= cut <= last:
            raise ConfigError(
                f"layercut={cut}: with renorm tokens leave before it, and {facts.family} lets them "
                f"leave before layers {first} to {last}."
            )
        here = [s for s in stages if isinstance(s.rule, RowRule) and s.rule.read]
        return (*here, Stage(Site.DECODER, layer=cut))

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        return [0] * len(signals.tokens)
