"""What a stage of a strategy may ask of a model and of the stages before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from vtprune.engine.signals import Step
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.interventions import Intervention, together
from vtprune.types import DecoderNeed, Facts, Frames, Scope, Site, Stage, Strategy, check_needs


def check_stage(
    strategy: Strategy,
    stage: Stage,
    before: Sequence[Step],
    n_earlier: int,
    scope: Scope | None,
    facts: Facts,
) -> None:
    """Refuses a stage that could not act as it says.

    Args:
        before: the steps that come before it; the first ``n_earlier`` are of other strategies.
        scope: what was asked for, None = the strategy's own.

    Raises:
        ConfigError: it comes too late in the list, or ``scope`` is unknown.
        UnsupportedError: what it needs, or where it acts, is not possible here.
    """
    earlier = before[:n_earlier]
    check_needs(stage.needs, facts, strategy.name)
    _check_order(strategy, stage, before)
    _check_scope(strategy, stage, scope, facts)
    if Frames() in stage.needs and any(step.stage.lets_leave for step in earlier):
        raise UnsupportedError(
            f"{strategy.name} compares whole frames, so it must come first in the list."
        )
    if stage.site is Site.ENCODER and earlier:
        raise UnsupportedError(
            f"{strategy.name} works inside the encoder, so it must come first in the list."
        )
    if stage.site is Site.DECODER and earlier and not strategy.acts_inside:
        raise UnsupportedError(
            f"{strategy.name} counts the tokens of whole images inside the language model, "
            "so it must come first in the list."
        )
    if stage.site is Site.ENCODER and stage.reads_text:
        raise UnsupportedError(
            f"{strategy.name} reads the instruction inside the encoder, which runs before "
            "the prompt is looked at. Let its stage act after the projector."
        )
    if (
        stage.site is Site.DECODER
        and stage.rule is None
        and not all(isinstance(need, DecoderNeed) for need in stage.needs)
    ):
        raise UnsupportedError(
            f"{strategy.name} reads {stage.needs} inside the language model; a stage there "
            "can read only quantities of the language model."
        )
    if stage.site is Site.ENCODER and not facts.in_tower:
        raise UnsupportedError(
            f"{strategy.name} works inside the encoder, but {facts.family} makes a visual "
            "token of several patches. Use a strategy that acts after the projector."
        )


def _check_order(strategy: Strategy, stage: Stage, before: Sequence[Step]) -> None:
    """Raises ConfigError for a stage that comes after one that acts later in the model."""
    if stage.evict is not None or getattr(stage.rule, "others", "keep") != "keep":
        for other in (step.stage for step in before if step.stage.layer == stage.layer):
            if other.evict is not None or getattr(other.rule, "others", "keep") != "keep":
                raise ConfigError(
                    f"Two strategies say what the cache of layer {stage.layer} holds. Give them "
                    "distinct layers=."
                )
    _check_edited(stage, before)
    if stage.evict is not None:
        return
    if stage.rule is not None:
        rules = [step.stage.rule for step in before if step.stage.layer == stage.layer]
        if not all(rule is None or together(rule, stage.rule) for rule in rules):
            raise ConfigError(
                f"Two strategies say what layer {stage.layer} computes. Give them distinct layers=."
            )
        return
    inside = [s.stage for s in before if s.stage.site is Site.DECODER and s.stage.lets_leave]
    last = max((other.layer or 0 for other in inside), default=None)
    if last is None or (stage.layer is not None and stage.layer > last):
        return
    where = "before" if stage.layer is None else f"before layer {stage.layer} of"
    raise ConfigError(
        f"{strategy.name} acts {where} the language model, but comes after a stage before its "
        f"layer {last}. List the strategies in the order in which they act, each at its own layer."
    )


def _check_edited(stage: Stage, before: Sequence[Step]) -> None:
    """Raises ConfigError where attention to a cache is edited whose heads hold different tokens."""
    same = [stage, *(step.stage for step in before if step.stage.layer == stage.layer)]
    if any(s.evict for s in same) and any(isinstance(s.rule, Intervention) for s in same):
        raise ConfigError(
            f"One strategy edits attention in layer {stage.layer}, another lets each head's cache "
            "hold tokens of its own there. Give them distinct layers=."
        )


def _check_scope(strategy: Strategy, stage: Stage, given: Scope | None, facts: Facts) -> None:
    """Raises where ``given`` is unknown, or the place of a stage says what competes there."""
    if given not in (None, *get_args(Scope)):
        known = ", ".join(map(repr, get_args(Scope)))
        raise ConfigError(f"scope={given!r} is unknown; choose one of {known}.")
    if given in (None, strategy.scope) or stage.site is Site.PROJECTOR:
        return
    where, possible = "on a whole sample, inside the language model", {"sample"}
    if stage.site is Site.ENCODER:
        where, possible = "tile by tile, inside the vision tower", {"tile"}
        if facts.n_tokens is not None:  # then every image is one tile
            possible.add("image")
    if given not in possible:
        raise UnsupportedError(
            f"scope={given!r}: {strategy.name} decides {where}. Leave scope out, or use a "
            "strategy that acts after the projector."
        )
