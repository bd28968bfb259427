"""From a user's words to steps: names, budgets, layers and resources checked against a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from vtprune.engine.signals import Step, select_group
from vtprune.engine.text_tower import TextTower
from vtprune.engine.vit_plan import Reduce
from vtprune.engine.vit_wrap import find_vit, wrap_vit
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.registry import adapter_classes, build, unknown
from vtprune.types import (
    Budget,
    DecoderNeed,
    Facts,
    Joint,
    Keep,
    Newlines,
    Positions,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    check_needs,
)
from vtprune.vlm_adapters._base import VLMAdapter
from vtprune.vlm_adapters._generic import REFUSED, Generic

Named = str | Strategy


def wrap(
    model: nn.Module,
    strategy: Named | Sequence[Named],
    *,
    keep: Keep | Sequence[Keep] | None = None,
    reduce: Reduce | None = None,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    newlines: Newlines | None = None,
    scope: Scope | None = None,
    processor: Any = None,
    text_encoder: Any = None,
    **options: Any,
) -> Handle:
    """Makes this model instance drop or merge visual tokens; returns the handle that undoes it.

    Args:
        model: a supported Hugging Face vision-language model, or a ViT of timm, open_clip or
            transformers: that gets a handle of the same manners, a ``ViTHandle``.
        strategy: a name, an instance, or a list of them applied in order.
        keep: visual tokens that stay per image: a count (int) or a share (float in (0, 1]);
            for a list of strategies one per strategy. Strategies of the kind ``compute``, from
            which no token leaves, take none.
        reduce: of a ViT, in place of ``keep``: the tokens that leave per block, at most half, as
            an int, ``(int, inflection)`` for a ramp or a list; or the share of FLOPs saved.
        layers: 0-based tower blocks to read instead of the strategy's own; never remapped. In a
            ViT, those to act in.
        positions: ``keep`` or ``renumber`` the survivors' position ids; default as the authors,
            but ``keep`` where they have several axes (M-RoPE).
        newlines: ``keep`` the tokens that end a row of a tiled image, or let them leave with the
            last token of their ``row``; default as the authors. ``keep=`` never counts them.
        scope: what competes for a budget: the tokens of a ``tile`` (of a video: a frame), of an
            ``image`` (or video), or of all images and videos of a ``sample``, which share the sum
            of their budgets; default as the authors. ``keep=`` counts per image with any.
        processor: needed by text-guided strategies, to tell words from special tokens.
        text_encoder: the ``CLIPModel`` that the vision tower was taken from, and its tokenizer;
            text-guided strategies then compare in its space, as their authors do.
        **options: fields of the strategy.

    Raises:
        ConfigError: unknown strategy or option, or a value out of range.
        UnsupportedError: a family or a combination that cannot give right answers.
    """
    vit = find_vit(model) if isinstance(model, nn.Module) else None
    if vit is not None:
        own = {"positions": positions, "newlines": newlines, "scope": scope}
        own |= {"processor": processor, "text_encoder": text_encoder}
        handle: Any = wrap_vit(model, vit, strategy, keep, reduce, layers, options, own)
        return handle
    adapter = find_adapter(model)
    model, facts = adapter.model, adapter.facts
    if reduce is not None:
        raise ConfigError(
            f"reduce={reduce} is for merging inside a ViT; for {facts.family} say keep= instead."
        )
    text_tower = None if text_encoder is None else TextTower(text_encoder, model)
    listed: list[Any] = list(strategy) if isinstance(strategy, (list, tuple)) else [strategy]
    if not listed:
        raise ConfigError("strategy=[] names none; give at least one.")
    if len(listed) > 1 and (options or layers is not None):
        raise ConfigError("Options and layers of several strategies go on their instances.")
    home = model.config.name_or_path or ""
    chosen = [_with_layers(build(s, **options), layers).beside(home) for s in listed]
    facts = _with_text(chosen, facts, text_tower)
    steps = _steps(chosen, _budgets(keep, chosen), facts, _policy(positions, facts), scope)
    reader = next((step.strategy.name for step in steps if step.stage.reads_text), None)
    if processor is None and reader is not None:
        raise ConfigError(
            f"{reader} reads the instruction; pass processor= (the model's own), so that "
            "words can be told from special tokens."
        )
    lines = _newlines(newlines, chosen, adapter)
    return Handle(model, adapter, steps, processor, lines, text_tower)


def select(
    strategy: Named,
    *,
    keep: Keep,
    signals: Signals,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Selection:
    """Decides on tensors of your own, without a model.

    Args:
        strategy: a name or an instance.
        keep: tokens that stay per row: a count (int) or a share (float in (0, 1]).
        signals: the candidate tokens ``[B, N, D]`` and the quantities that the strategy reads.
        layers: use only the quantities of these blocks.
        **options: fields of the strategy.

    Returns:
        The selection of ``[B, K]`` tokens; ``selection.apply(x)`` gives the outputs.

    Raises:
        ConfigError: unknown strategy or option, or more tokens asked for than there are.
        InputError: a quantity that the strategy reads is missing.
    """
    chosen = _with_layers(build(strategy, **options), layers)
    if chosen.kind == "compute":
        raise ConfigError(f"{chosen.name} chooses no tokens; give it to wrap().")
    budget = Budget.of(keep)
    budget.check(signals.n)
    if not chosen.acts_inside:  # there ``layers`` says where to act, not what to read
        signals = _of_layers(signals, chosen.layers)
    counts = set(chosen.counts(signals, budget))
    if len(counts) > 1:
        raise ConfigError(
            f"{chosen.name} keeps different counts per row here ({sorted(counts)}); "
            "select each row on its own, with signals.rows(index)."
        )
    return select_group(chosen, signals, counts.pop())


def find_adapter(model: nn.Module) -> VLMAdapter:
    """Returns the adapter of this model's class, or the generic one.

    Raises:
        ConfigError: not a transformers model. UnsupportedError: no adapter can serve its class.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"wrap() takes a transformers model, not a {name}.")
    if name in REFUSED:
        raise UnsupportedError(f"{name} cannot be wrapped: {REFUSED[name]}")
    known = {served: cls for cls in adapter_classes() for served in cls.classes}
    if name in known:
        return known[name](model)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        return Generic(model)
    raise UnsupportedError(str(unknown("model family", name, known)))


def _with_layers(strategy: Strategy, layers: Sequence[int] | None) -> Strategy:
    return strategy if layers is None else replace(strategy, layers=tuple(layers))


def _of_layers(signals: Signals, layers: Sequence[int] | None) -> Signals:
    """Returns the signals with the quantities of ``layers`` only; of all when it is None.

    Raises:
        InputError: the signals hold nothing of one of them.
    """
    if layers is None:
        return signals
    missing = sorted(set(layers) - {need.layer for need in signals.values})
    if missing:
        have = ", ".join(map(str, signals.values)) or "none"
        raise InputError(f"The signals hold nothing of layers {missing}; they hold: {have}.")
    values = {need: value for need, value in signals.values.items() if need.layer in layers}
    return replace(signals, values=values)


def _budgets(keep: Keep | Sequence[Keep] | None, chosen: Sequence[Strategy]) -> list[Budget]:
    """Returns the budget of each strategy; everything where no token leaves."""
    taking = [strategy.kind != "compute" for strategy in chosen]
    if not any(taking):
        if keep is not None:
            names = " + ".join(strategy.name for strategy in chosen)
            raise ConfigError(
                f"keep={keep!r}: {names} lets no token leave. Leave keep out; layers= and its "
                "options say how much is computed."
            )
        return [Budget(fraction=1.0)] * len(chosen)
    if keep is None:
        raise ConfigError("keep is missing; give the tokens that stay per image, e.g. keep=0.25.")
    each: list[Any] = list(keep) if isinstance(keep, (list, tuple)) else [keep]
    if len(each) != sum(taking):
        raise ConfigError(f"keep={keep!r} gives {len(each)} budgets for {sum(taking)} strategies.")
    budgets = iter([Budget.of(one) for one in each])
    return [next(budgets) if takes else Budget(fraction=1.0) for takes in taking]


def _steps(
    chosen: Sequence[Strategy],
    budgets: Sequence[Budget],
    facts: Facts,
    policy: Positions | None,
    scope: Scope | None,
) -> list[Step]:
    steps: list[Step] = []
    for strategy, budget in zip(chosen, budgets, strict=True):
        if facts.n_tokens is not None and not strategy.acts_inside:
            budget.check(facts.n_tokens)
        strategy.check_budget(budget, facts)
        earlier = list(steps)
        for stage in strategy.plan(facts):
            check_needs(stage.needs, facts, strategy.name)
            _check_order(strategy, stage, steps)
            _check_scope(strategy, stage, scope, facts)
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
            ids: Positions = "keep" if facts.mrope else policy or strategy.positions
            left = budget.times(stage.times)
            steps.append(Step(strategy, stage, left, ids, scope or strategy.scope))
    return steps


def _check_order(strategy: Strategy, stage: Stage, before: Sequence[Step]) -> None:
    """Raises ConfigError for a stage that comes after one that acts later in the model."""
    if stage.rule is not None:
        if any(step.stage.rule and step.stage.layer == stage.layer for step in before):
            raise ConfigError(
                f"Two strategies say what layer {stage.layer} computes. Give them distinct layers=."
            )
        return
    inside = [s.stage for s in before if s.stage.site is Site.DECODER and s.stage.rule is None]
    last = max((other.layer or 0 for other in inside), default=None)
    if last is None or (stage.layer is not None and stage.layer > last):
        return
    where = "before" if stage.layer is None else f"before layer {stage.layer} of"
    raise ConfigError(
        f"{strategy.name} acts {where} the language model, but comes after a stage before its "
        f"layer {last}. List the strategies in the order in which they act, each at its own layer."
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


def _with_text(chosen: Sequence[Strategy], facts: Facts, tower: TextTower | None) -> Facts:
    """Returns the facts with what a text tower adds.

    Raises:
        ConfigError: no strategy reads one, or some read the instruction in another way.
    """
    if tower is None:
        return facts
    facts = replace(facts, signals=facts.signals | {Joint})
    stages = [stage for strategy in chosen for stage in strategy.plan(facts)]
    reading = [stage for stage in stages if stage.reads_text]
    joint = [stage for stage in reading if any(isinstance(need, Joint) for need in stage.needs)]
    if not joint:
        raise ConfigError("text_encoder was given, but no strategy here reads it; leave it out.")
    if len(joint) < len(reading):
        raise ConfigError(
            "One strategy reads the instruction by text_encoder, another by the language model's "
            "embeddings. Leave text_encoder out, or wrap with one of them."
        )
    return facts


def _policy(given: Positions | None, facts: Facts) -> Positions | None:
    if given not in (None, "keep", "renumber"):
        raise ConfigError(f"positions={given!r} is unknown; choose 'keep' or 'renumber'.")
    if given == "renumber" and facts.mrope:
        raise UnsupportedError(
            f"positions='renumber': {facts.family} has position ids for time, height and width, "
            "which say where a token was in the image. Leave positions out; it keeps them."
        )
    return given


def _newlines(given: Newlines | None, chosen: Sequence[Strategy], adapter: VLMAdapter) -> Newlines:
    if given not in (None, "keep", "row"):
        raise ConfigError(f"newlines={given!r} is unknown; choose 'keep' or 'row'.")
    if given == "row" and not adapter.newlines:
        raise ConfigError(
            f"newlines='row': {adapter.facts.family} has no tokens that end a row; leave it out."
        )
    if not adapter.newlines:
        return "keep"
    return given or chosen[-1].newlines
