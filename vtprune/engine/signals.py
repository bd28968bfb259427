"""From the tensors of many images to one decision per image: grouping, counting, aligning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.engine.excluding import among_others, excludes
from vtprune.engine.timing import timed
from vtprune.errors import InputError, UnsupportedError
from vtprune.types import (
    Budget,
    Inside,
    Mix,
    Positions,
    Quantity,
    Scope,
    Selection,
    Signals,
    Stage,
    Strategy,
    TowerNeed,
)


@dataclass(frozen=True)
class Step:
    """A stage with the strategy that planned it, the budget it keeps, and its position ids.

    ``scope`` says what competes for the budget of a stage after the projector.
    """

    strategy: Strategy
    stage: Stage
    budget: Budget
    positions: Positions
    scope: Scope = "image"

    @property
    def wanted(self) -> int:
        """Tokens that were asked for, 0 where it was a share."""
        times = self.stage.times
        return (self.budget.tokens or 0) // (1 if callable(times) else times)


@dataclass
class Images:
    """The images of one call, in order; tensors of one image have leading dimension ``n_i``.

    ``tokens`` change from stage to stage; ``values`` follow the survivors; ``kept`` maps them to
    the positions before the first stage. Inside the language model the samples take the place of
    the images, and ``inside`` says where. ``budgets`` take the place of the step's,
    and a mix may read ``n_prefix`` tokens after those of an image. Of tiles ``owners`` says which
    image each is a part of, and ``sizes`` (``[n_i]`` each) how many patches a token stands for.
    ``tiles`` say of what part of their image tokens are, as those of an ``Item``.
    """

    tokens: list[Tensor]
    grids: list[tuple[int, int, int] | None]
    values: Mapping[Quantity, list[Tensor]]
    text: list[Tensor] | None
    kept: list[Selection]
    inside: Inside | None = None
    budgets: Sequence[Budget] | None = None
    n_prefix: int = 0
    owners: Sequence[int] | None = None
    sizes: Sequence[Tensor] | None = None
    tiles: list[Tensor | None] = field(default_factory=list)

    def and_also(self, others: Images) -> Images:
        """Returns these images and, after them, the others, with the same quantities."""
        return Images(
            self.tokens + others.tokens,
            self.grids + others.grids,
            {need: value + others.values[need] for need, value in self.values.items()},
            None,
            self.kept + others.kept,
            tiles=self.tiles + others.tiles,
        )


@timed("score")
def decide(step: Step, images: Images) -> list[Selection]:
    """Asks the strategy for one selection per image (batch dimension 1).

    The strategy is called on groups of images with equal numbers of tokens, then of kept tokens,
    so it never sees padding.
    """
    chosen: dict[int, Selection] = {}
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    budgets = images.budgets or [step.budget] * len(images.tokens)
    for i, tokens in enumerate(images.tokens):
        alone = i if step.strategy.exclude_sinks else None  # each row has sinks of its own
        groups[len(tokens), images.grids[i], budgets[i], alone].append(i)
    every = [_signals(step, images, members) for members in groups.values()]
    for members, group in zip(groups.values(), every, strict=True):
        signals = replace(group, groups=every, budget=budgets[members[0]])
        counts = step.strategy.counts(signals, budgets[members[0]])
        for k in sorted(set(counts)):
            rows = [row for row, count in enumerate(counts) if count == k]
            part = signals
            if len(rows) < len(counts):
                part = signals.rows(torch.tensor(rows, device=signals.tokens.device))
            selection = select_group(step.strategy, part, k)
            chosen |= {members[row]: selection.row(j) for j, row in enumerate(rows)}
    return [chosen[i] for i in range(len(images.tokens))]


def _signals(step: Step, images: Images, members: Sequence[int]) -> Signals:
    tokens = torch.stack([images.tokens[i] for i in members])
    owners = members if images.owners is None else [images.owners[i] for i in members]
    return Signals(
        tokens,
        images.grids[members[0]],
        torch.tensor(owners, device=tokens.device),
        {
            need: torch.stack([images.values[need][i] for i in members])
            for need in step.stage.quantities
        },
        None if images.text is None else [images.text[i] for i in members],
        images.inside and images.inside.of(members),
        images.n_prefix,
        None if images.sizes is None else torch.stack([images.sizes[i] for i in members]),
    )


def select_group(strategy: Strategy, signals: Signals, k: int) -> Selection:
    """Returns the checked selection of ``k`` tokens per row; everything when ``k`` covers N."""
    batch, n = signals.tokens.shape[:2]
    if k >= n:
        return Selection.all(batch, n, signals.tokens.device)
    if k < 1:
        return _none(strategy, signals)
    if excludes(strategy, signals):
        others, chosen = among_others(signals, k, lambda some: _checked(strategy, some, k))
        kept = Selection(others[None], n)
        return kept if chosen is None else compose(kept, chosen)
    return _checked(strategy, signals, k)


def _checked(strategy: Strategy, signals: Signals, k: int) -> Selection:
    """Returns what the strategy selects.

    Raises:
        InputError: it is not what was asked for.
    """
    batch, n = signals.tokens.shape[:2]
    selection = strategy.select(signals, k)
    if tuple(selection.rows.shape) != (batch, k) or selection.n != n:
        raise InputError(
            f"{strategy.name} returned rows {tuple(selection.rows.shape)} of {selection.n} tokens; "
            f"asked were {(batch, k)} of {n}."
        )
    return selection


def _none(strategy: Strategy, signals: Signals) -> Selection:
    """Returns the selection of no token.

    Raises:
        InputError: not inside the language model, the one place where none may be left.
    """
    if signals.inside is None or not signals.inside.images:
        raise InputError(
            f"{strategy.name} leaves none of {signals.n} tokens. Inside the language model all may "
            "leave; elsewhere let counts() return at least 1."
        )
    rows = torch.zeros(len(signals.tokens), 0, dtype=torch.int64, device=signals.tokens.device)
    return Selection(rows, signals.n)


def survive(images: Images, chosen: Sequence[Selection], later: Collection[TowerNeed]) -> Images:
    """Returns the images after ``chosen``: the quantities in ``later`` follow the survivors."""
    refuse_orphans(chosen, later)
    return Images(
        [s.apply(x[None])[0] for s, x in zip(chosen, images.tokens, strict=True)],
        [g if s.is_identity else None for s, g in zip(chosen, images.grids, strict=True)],
        {
            need: [v[s.rows[0]] for s, v in zip(chosen, images.values[need], strict=True)]
            for need in later
        },
        images.text,
        [compose(a, b) for a, b in zip(images.kept, chosen, strict=True)],
        tiles=left_of(images.tiles, chosen),
    )


def left_of(tiles: Sequence[Tensor | None], chosen: Sequence[Selection]) -> list[Tensor | None]:
    """Returns the ``tiles`` of what was chosen; a new token is where its slot is."""
    return [
        None if places is None else places[s.slots[0].cpu()]
        for places, s in zip(tiles, chosen, strict=True)
    ]


def refuse_orphans(chosen: Sequence[Selection], later: Collection[TowerNeed]) -> None:
    """Raises UnsupportedError where a new row (a kept CLS) lacks a quantity that is read later."""
    if later and renews(chosen):
        raise UnsupportedError(
            "A strategy that makes new tokens cannot be followed by one that reads signals of the "
            "tower from before. Put the latter first."
        )


def renews(chosen: Sequence[Selection]) -> bool:
    """Whether one of them makes a new row."""
    return any(s.mix is not None and bool((s.rows < 0).any()) for s in chosen)


def compose(first: Selection, second: Selection) -> Selection:
    """Returns the selection (batch 1) that equals ``second`` after ``first``."""
    if first.is_identity:
        return second
    if second.is_identity:
        return first
    new = second.rows < 0
    rows = first.rows.gather(1, second.rows.clamp(min=0)).masked_fill(new, -1)
    if first.mix is None and second.mix is None:
        return Selection(rows, first.n)
    width = first.n + max(first.n_prefix, second.n_prefix)
    weights = _matrix(second, first.rows.shape[1]) @ _matrix(first, width)
    target, source = weights.nonzero(as_tuple=True)
    return Selection(rows, first.n, Mix(source[None], target[None], weights[target, source][None]))


def _matrix(selection: Selection, width: int) -> Tensor:
    """Dense weights ``[K, width]`` of a selection with batch dimension 1."""
    k = selection.rows.shape[1]
    weights = torch.zeros(k, width, device=selection.rows.device)
    if selection.mix is None:
        return weights.scatter_(1, selection.rows[0][:, None], 1.0)
    mix = selection.mix
    return weights.index_put_((mix.target[0], mix.source[0]), mix.weight[0], accumulate=True)
