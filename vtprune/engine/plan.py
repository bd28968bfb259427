"""From a user's words to steps: names, budgets, layers and resources checked against a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vtprune.engine.excluding import stages_of
from vtprune.engine.signals import Step, select_group
from vtprune.engine.stage_checks import check_stage
from vtprune.engine.text_tower import TextTower
from vtprune.engine.vit_plan import Reduce
from vtprune.engine.vit_wrap import find_vit, wrap_vit
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.registry import adapter_classes, build, unknown
from vtprune.setting import is_setting, read_setting
from vtprune.types import (
    Budget,
    Facts,
    FirstState,
    Frames,
    Joint,
    Keep,
    Newlines,
    Positions,
    Scope,
    Selection,
    Signals,
    Strategy,
    Tile,
)
from vtprune.vlm_adapters._base import VLMAdapter
from vtprune.vlm_adapters._generic import REFUSED, Generic

Named = str | Strategy


def wrap(
    model: nn.Module,
    strategy: Named | PathLike[str] | Sequence[Named],
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
        strategy: a name, an instance, or a list of them applied in order; or the file of a setting,
            ``.yaml``, which has options and budget too.
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
    if is_setting(strategy):
        found = read_setting(strategy, keep=keep, reduce=reduce, layers=layers, **options)
        strategy, options = found.strategy, dict(found.options)
        keep, reduce = found.keep, found.reduce
    vit = find_vit(model) if isinstance(model, nn.Module) else None
    if vit is not None:
        own = {"positions": positions, "newlines": newlines, "scope": scope}
        own |= {"processor": processor, "text_encoder": text_encoder}
        handle: Any = wrap_vit(model, vit, strategy, keep, reduce, layers, options, own)
        return handle
    adapter = find_adapter(model)
    model, facts = adapter.model, _facts(adapter)
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
    steps = steps_of(chosen, _budgets(keep, chosen), facts, _policy(positions, facts), scope)
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
    if chosen.kind in ("compute", "cache"):
        raise ConfigError(f"{chosen.name} chooses no tokens; give it to wrap().")
    if chosen.exclude_sinks and not any(isinstance(n, FirstState) for n in signals.values):
        raise InputError("exclude_sinks=True: the signals hold no FirstState, by which to tell.")
    budget = Budget.of(keep)
    budget.check(signals.n)
    if not chosen.acts_inside:  # there ``layers`` says where to act, not what to read
        signals = _of_layers(signals, chosen.layers)
    signals = replace(signals, budget=budget)
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


def steps_of(
    chosen: Sequence[Strategy],
    budgets: Sequence[Budget],
    facts: Facts,
    policy: Positions | None,
    scope: Scope | None,
) -> list[Step]:
    """Returns the steps of these strategies on such a model, checked as by ``wrap``."""
    steps: list[Step] = []
    for strategy, budget in zip(chosen, budgets, strict=True):
        if facts.n_tokens is not None and not strategy.acts_inside:
            budget.check(facts.n_tokens)
        strategy.check_budget(budget, facts)
        n_earlier = len(steps)
        for stage in stages_of(strategy, facts):
            check_stage(strategy, stage, steps, n_earlier, scope, facts)
            own = stage.positions or strategy.positions
            ids: Positions = "keep" if facts.mrope else policy or own
            left = budget.times(stage.times)
            steps.append(Step(strategy, stage, left, ids, scope or strategy.scope))
    return steps


def _facts(adapter: VLMAdapter) -> Facts:
    """Returns the adapter's facts, with tiles and frames among the signals where a model has them.

    Only tiles that are stitched together have newlines.
    """
    width = getattr(adapter.language_model.config, "hidden_size", None)
    facts = replace(adapter.facts, decoder_width=width)
    videos = any(modality.name == "video" for modality in adapter.modalities)
    found = {kind for kind, here in {Frames: videos, Tile: adapter.newlines}.items() if here}
    return replace(facts, signals=facts.signals | found)


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
