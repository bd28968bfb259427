"""What a handle tells about its last call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtprune.errors import UnsupportedError
from vtprune.flops import Cost, Shape, equivalent_tokens


@dataclass(frozen=True)
class ImageReport:
    """One image, tile or video (``what``): its row in the batch, visual tokens before and after.

    ``short`` says that it had fewer tokens than were to be kept; ``fixed`` of those kept are made
    of no patch (newlines), and no budget counts them. The others form a ``grid`` of so many frames,
    rows and columns, None where they form none.
    """

    sample: int
    tokens: int
    kept: int
    short: bool
    what: str = "image"
    fixed: int = 0
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class StageReport:
    """One stage inside the language model on one row of the batch.

    ``tokens`` visual tokens of the row reach ``layer`` (0-based), ``kept`` of them enter it; if
    ``merged`` some of those are made of several.
    """

    layer: int
    sample: int
    tokens: int
    kept: int
    merged: bool = False


@dataclass(frozen=True)
class RuleReport:
    """What visual rows compute inside the language model, and how much that was in the last call.

    Attributes:
        layers: by rule in words its 0-based layers.
        published: share of what visual tokens cost in whole layers, by the published formula.
        realised: share of the multiply-accumulates of all that enters the language model's layers,
            words and padding too, that were really made there; what ``densities`` say is not in it.
        densities: by layer the share of the prompts' attention, in the order of tokens, that was
            computed, on average; none where attention is the model's own.
    """

    layers: Mapping[str, tuple[int, ...]]
    published: float = 1.0
    realised: float = 1.0
    densities: Mapping[int, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the report in lines."""
        said = [f"  layers {list(numbers)}: {rule}" for rule, numbers in self.layers.items()]
        if self.densities:
            mean = 100 * sum(self.densities.values()) / len(self.densities)
            said.append(f"  of attention in {len(self.densities)} layers {mean:.1f} % is computed")
        return [
            *said,
            f"  visual tokens cost {100 * self.published:.1f} % by the formula; of what enters the "
            f"layers {100 * self.realised:.1f} % is computed",
        ]


@dataclass(frozen=True)
class TileReport:
    """One row of the vision tower, up to the block that yields the features.

    ``attended`` and ``passed`` have the tokens, [CLS] among them, that enter attention and MLP of
    each block; without a stage they were ``tokens``. ``config`` is the tower's. ``shares`` has what
    part of the attention in each block counts, where rules stand for it; empty = all of it.
    """

    tokens: int
    attended: tuple[int, ...]
    passed: tuple[int, ...]
    config: Any = field(default=None, repr=False, compare=False)
    shares: tuple[float, ...] = ()

    def cost(self, theoretical: bool = False) -> Cost:
        """Returns its operations, by the published formulas.

        Args:
            theoretical: whether of attention only what counts does, as if a kernel left out the
                rest; here it is computed.
        """
        shape = replace(Shape.of(self.config), layers=len(self.attended))
        whole = [self.tokens] * shape.layers
        macs = shape.prefill(self.attended, self.passed)
        if theoretical:
            pairs = zip(self.attended, self.shares, strict=False)
            macs -= sum((1 - share) * shape.attending(n) for n, share in pairs)
        return Cost(macs, shape.prefill(whole))


@dataclass(frozen=True)
class CacheReport:
    """Bytes of keys and values after the prefill, of all layers and rows, beams and padding too.

    ``held`` by the entries of the prompt, which would be ``unpruned`` without a strategy;
    ``allocated`` are more where a static cache has room left.
    """

    held: int
    unpruned: int
    allocated: int

    @property
    def share(self) -> float:
        """What is held of what would be without a strategy, 0 to 1."""
        return self.held / self.unpruned


@dataclass(frozen=True)
class Report:
    """The last call of a wrapped model; no images before the first one.

    ``ms`` holds milliseconds per phase when ``Handle.timing`` is on: ``encode`` (tower, projector
    and selection) and ``language`` (everything after). ``parts`` holds those of what a strategy
    adds: ``encode.score`` and ``language.score`` (reading signals, deciding, and cutting hidden
    states), ``encode.compact`` and, between the two, ``compact`` (shortening the prompt).

    ``text`` has per row of the batch the tokens that are no visual ones, ``tiles`` the rows of the
    tower where they are known, ``cache`` what the cache held after the prefill if there was one of
    a known kind, and ``config`` describes the language model. ``held`` has, of layers whose cache
    visual tokens left by themselves, how many were there and how many each head kept, per row.
    """

    strategy: str
    layers: tuple[int, ...]
    images: tuple[ImageReport, ...] = ()
    stages: tuple[StageReport, ...] = ()
    decoder_layers: int = 0
    ms: Mapping[str, float] = field(default_factory=dict)
    rules: RuleReport | None = None
    text: tuple[int, ...] = ()
    tiles: tuple[TileReport, ...] = ()
    cache: CacheReport | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    held: tuple[StageReport, ...] = ()
    config: Any = field(default=None, repr=False, compare=False)

    def of_sample(self, sample: int) -> tuple[int, float]:
        """Returns a row's visual tokens, and how many of them enter a decoder layer, on average."""
        tokens = sum(image.tokens for image in self.images if image.sample == sample)
        return tokens, equivalent_tokens(self.entering(sample))

    def entering(self, sample: int) -> tuple[int, ...]:
        """Returns how many visual tokens of a row enter each layer of the language model."""
        kept = sum(image.kept for image in self.images if image.sample == sample)
        counts = [kept] * self.decoder_layers
        for stage in self.stages:
            if stage.sample == sample:
                counts[stage.layer :] = [stage.kept] * (self.decoder_layers - stage.layer)
        return tuple(counts)

    def caching(self, sample: int) -> tuple[int, ...]:
        """Returns how many visual tokens of a row each layer's cache held after the prefill."""
        counts = list(self.entering(sample))
        for held in self.held:
            if held.sample == sample:
                counts[held.layer] = held.kept
        return tuple(counts)

    def prefill(self, sample: int | None = None, *, text: bool = True) -> Cost:
        """Returns the operations of the language model on the prompt, by the published formulas.

        Row rules have their realised share, which is that of the whole batch.

        Args:
            sample: row of the batch; None = all together.
            text: whether tokens that are no visual ones count, as they do in SparseVLM's figures,
                but not in those of TransPrune and PyramidDrop.

        Raises:
            UnsupportedError: it is not known how the model's layers are built.
        """
        shape = Shape.of(self.config)
        total = Cost(0, 0)
        for entering, whole in self._schedules(sample, text, self.entering):
            total += Cost(shape.prefill(entering), shape.prefill(whole))
        realised = 1 if self.rules is None else self.rules.realised
        return Cost(total.macs * realised, total.unpruned)

    def decode(self, new: int, sample: int | None = None) -> Cost:
        """Returns the operations of ``new`` tokens decoded per row; otherwise as ``prefill``."""
        shape = Shape.of(self.config)
        total = Cost(0, 0)
        for entered, whole in self._schedules(sample, True, self.caching):
            total += Cost(shape.decode(entered, new), shape.decode(whole, new))
        return total

    def tower(self, theoretical: bool = False) -> Cost:
        """Returns the operations of the vision tower, up to the block that yields the features.

        Args:
            theoretical: whether of attention only what counts does, where rules stand for it.

        Raises:
            UnsupportedError: it is not known how its blocks are built.
        """
        return sum((tile.cost(theoretical) for tile in self.tiles), Cost(0, 0))

    def _schedules(
        self, sample: int | None, text: bool, visual: Callable[[int], tuple[int, ...]]
    ) -> list[tuple[list[int], list[int]]]:
        """Per row the tokens of each layer, and those that would be there without a strategy."""
        rows = range(len(self.text)) if sample is None else (sample,)
        schedules = []
        for row in rows:
            words = self.text[row] if text else 0
            tokens = words + self.of_sample(row)[0]
            there = [words + n for n in visual(row)]
            schedules.append((there, [tokens] * self.decoder_layers))
        return schedules

    def _costs(self) -> list[str]:
        """What was computed and stored, in lines; none of what is not known."""
        lines = []
        for name, cost in (("tower", self.tower), ("prefill", self.prefill)):
            try:
                found = cost()
            except UnsupportedError:
                continue
            if found.unpruned:
                lines.append(
                    f"  {name}: {found.flops / 1e9:.4g} of {2 * found.unpruned / 1e9:.4g} GFLOPs, "
                    f"{100 * found.share:.1f} %"
                )
        if any(tile.shares for tile in self.tiles):
            cost = self.tower(theoretical=True)
            lines.append(
                f"  tower in theory, if attention were computed only where it counts: "
                f"{cost.flops / 1e9:.4g} GFLOPs, {100 * cost.share:.1f} %"
            )
        if self.cache is not None:
            held, unpruned = self.cache.held / 2**20, self.cache.unpruned / 2**20
            lines.append(f"  cache after the prefill: {held:.4g} of {unpruned:.4g} MiB")
        return lines

    def _held(self) -> list[str]:
        """What heads hold, in lines: layers of a row that do alike in one."""
        alike: dict[tuple[int, int, int], list[int]] = {}
        for held in self.held:
            alike.setdefault((held.sample, held.kept, held.tokens), []).append(held.layer)
        return [
            f"  caches of layers {layers} (row {row}): {kept} of {tokens} visual tokens per head"
            for (row, kept, tokens), layers in alike.items()
        ]

    def __str__(self) -> str:
        reads = f", tower blocks {list(self.layers)}" if self.layers else ""
        lines = [f"{self.strategy}{reads}"]
        for i, image in enumerate(self.images):
            share = 100 * image.kept / image.tokens
            note = " (fewer than asked for)" if image.short else ""
            if image.fixed:
                note += f", {image.fixed} of them made of no patch"
            lines.append(
                f"  {image.what} {i} (row {image.sample}): {image.kept} of {image.tokens} visual "
                f"tokens, {share:.1f} %{note}"
            )
        lines += [
            f"  before layer {stage.layer} (row {stage.sample}): {stage.kept} of {stage.tokens} "
            "visual tokens"
            for stage in self.stages
        ]
        lines += self.rules.lines() if self.rules is not None else []
        lines += self._held()
        lines += self._costs()
        times = {**self.ms, **self.parts}
        lines += [f"  {phase}: {ms:.1f} ms" for phase, ms in sorted(times.items())]
        return "\n".join(lines)
