"""What can be pruned inside an engine: a strategy that leaves a known number of tokens.

An engine sizes a prompt before it has seen an image, encodes each image by itself, keeps what it
made of it for other prompts, and runs the language model with kernels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.encoder import encode
from vtprune.engine.plan import steps_of
from vtprune.engine.signals import Step
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.serve.setting import Setting
from vtprune.serve.towers import Tower
from vtprune.types import Facts, Selection, Site, Stage, Strategy

INSTEAD = "Prune in transformers and send embeddings (vtprune.serve.to_vllm_inputs)"


@dataclass(frozen=True)
class Shape:
    """An image's tokens that a strategy may choose from, those made of no patch, and its tiles."""

    free: int
    fixed: int
    tiles: int


class Static:
    """One strategy for one family, in an engine that must know the counts beforehand.

    Args:
        adapter: of the family; a configuration is all that it needs to count.
        setting: None = nothing is pruned.

    Raises:
        ConfigError: a value out of range.
        UnsupportedError: no engine can serve the strategy, with the reason and what can be done.
    """

    def __init__(self, adapter: Tower, setting: Setting | None) -> None:
        self.adapter: Any = adapter
        (self.image,) = adapter.modalities
        self.step = None if setting is None else _step(adapter, setting)

    @property
    def layers(self) -> list[int]:
        """Blocks of the tower whose attention is read."""
        needs = self.step.stage.tower_needs if self.step else ()
        return sorted({need.layer for need in needs})

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Returns how many tokens each image keeps, newlines among them."""
        return [self._count(shape) for shape in self.shapes(batch)]

    def shapes(self, batch: Mapping[str, Any]) -> list[Shape]:
        """Returns what each image is made of, by its size alone.

        Args:
            batch: sizes of the images as the adapter takes them.
        """
        per_tile = torch.tensor(self.adapter.per_tile(batch), device="cpu")
        tile = torch.repeat_interleave(per_tile).double()  # of each patch
        shapes = []
        for tokens in self.adapter.carry(self.image, tile[:, None], batch):
            made = tokens[:, 0][~tokens[:, 0].isnan()]
            shapes.append(Shape(len(made), len(tokens) - len(made), len(made.round().unique())))
        return shapes

    def _count(self, shape: Shape) -> int:
        if self.step is None:
            return shape.free + shape.fixed
        kept = self.step.budget.count(shape.free)
        if self.step.stage.site is Site.ENCODER:  # every tile keeps at least one
            kept = max(kept, shape.tiles)
        return kept + shape.fixed

    @torch.no_grad()
    def prune(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Selection]]:
        """Encodes images and returns what is left of each, ``[K_i, D]``, and which tokens.

        Args:
            batch: pixels and sizes as the adapter takes them.

        Raises:
            InputError: the strategy left other numbers of tokens than were promised.
        """
        shapes = self.shapes(batch)
        total = sum(shape.free + shape.fixed for shape in shapes)
        ids = torch.full((1, total), self.image.placeholder)  # no prompt is known here
        steps = [] if self.step is None else [self.step]
        encoded = encode(self.adapter, steps, {**batch, "input_ids": ids}, None, "keep")
        tokens = list(encoded.outputs[self.image.name].pooler_output)
        promised, left = [self._count(shape) for shape in shapes], [len(x) for x in tokens]
        if left != promised:
            raise InputError(f"{self.step} left {left} tokens of the images, promised {promised}.")
        return tokens, encoded.selections


def _step(adapter: Tower, setting: Setting) -> Step:
    strategy, facts = setting.strategy, adapter.facts
    strategy = strategy.beside(adapter.model.config.name_or_path or "")
    if strategy.kind == "adaptive":
        raise UnsupportedError(
            f"{strategy.name} keeps as many tokens as the image asks for, but an engine sizes the "
            f"prompt before it has seen the image. {INSTEAD}, or use one that keeps a count."
        )
    for stage in strategy.plan(facts):
        _check_stage(strategy, stage, facts)
    policy = _positions(setting, facts)
    steps = steps_of([strategy], [setting.budget], facts, policy, setting.scope)
    if len(steps) != 1:
        raise UnsupportedError(
            f"{strategy.name} acts {len(steps)} times on {facts.family}; inside an engine a "
            f"strategy acts once. {INSTEAD}."
        )
    if steps[0].scope == "sample":
        raise UnsupportedError(
            f"scope='sample': {strategy.name} lets the images of a prompt share one budget, but an "
            f"engine encodes each image by itself. Give scope='image', or: {INSTEAD}."
        )
    _check_newlines(strategy, setting, adapter)
    return steps[0]


def _check_stage(strategy: Strategy, stage: Stage, facts: Facts) -> None:
    """Raises UnsupportedError for a stage that cannot act inside an engine."""
    if stage.site is Site.DECODER:
        raise UnsupportedError(
            f"{strategy.name} acts inside the language model (layer {stage.layer}), but the "
            "engine's cache holds equally many tokens in all layers, and its kernels return no "
            "attention. Use one that acts before the language model, such as 'fastervlm', or "
            "transformers with vtprune.wrap."
        )
    if stage.reads_text:
        raise UnsupportedError(
            f"{strategy.name} reads the instruction, but an engine encodes an image without its "
            "prompt and keeps what it made of it for other prompts. "
            f"{INSTEAD}, or use one that reads the image alone, such as 'divprune'."
        )
    late = [need for need in stage.tower_needs if need.layer > facts.feature_block]
    if late:
        raise UnsupportedError(
            f"{strategy.name} reads {late[0]}, but the engine builds the tower up to block "
            f"{facts.feature_block} alone, which yields the features. Give "
            f"options={{'layers': [{facts.feature_block}]}}, or: {INSTEAD}."
        )
    early = stage.layer is not None and stage.layer < facts.feature_block
    if stage.site is Site.ENCODER and (early or stage.before_mlp or stage.ahead):
        raise UnsupportedError(
            f"{strategy.name} lets tokens leave between blocks of the tower, whose layers in the "
            f"engine take whole images. {INSTEAD}, or use one that acts after the tower."
        )


def _positions(setting: Setting, facts: Facts) -> Any:
    """Returns the policy of position ids that the engine follows anyway.

    Raises:
        UnsupportedError: another is asked for, or is the authors'.
    """
    possible = "keep" if facts.mrope else "renumber"
    given = setting.positions
    if given not in (None, "keep", "renumber"):
        raise ConfigError(f"positions={given!r} is unknown; choose 'keep' or 'renumber'.")
    wanted = given or ("keep" if facts.mrope else setting.strategy.positions)
    if wanted != possible:
        whose = "given" if given else f"the authors' choice in {setting.strategy.name}"
        raise UnsupportedError(
            f"positions={wanted!r} ({whose}): on {facts.family} the engine can only {possible} the "
            f"ids of tokens that stay. Give positions={possible!r} to accept that."
        )
    return None if facts.mrope else possible


def _check_newlines(strategy: Strategy, setting: Setting, adapter: Tower) -> None:
    given = setting.newlines
    if given not in (None, "keep", "row"):
        raise ConfigError(f"newlines={given!r} is unknown; choose 'keep' or 'row'.")
    if given and not adapter.newlines:
        raise ConfigError(
            f"newlines={given!r}: {adapter.facts.family} has no tokens that end a row; leave it "
            "out."
        )
    if adapter.newlines and (given or strategy.newlines) == "row":
        raise UnsupportedError(
            "newlines='row': how many newlines stay depends on what is kept of the image, but an "
            f"engine sizes the prompt before it has seen it. Give newlines='keep', or: {INSTEAD}."
        )
