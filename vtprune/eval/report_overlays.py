"""The pictures of a report: what each strategy kept of a few samples, at every budget."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.budgets import CEILING, FLOOR, Point
from vtprune.eval.regions import in_mean_color, merges
from vtprune.eval.report_seen import Picture, Regions, Seer
from vtprune.eval.rows import Answer
from vtprune.eval.samples import LMMS
from vtprune.eval.show import DIMMED, frames
from vtprune.eval.stats import Right
from vtprune.registry import build

if TYPE_CHECKING:
    from vtprune.eval.report_data import Swept

WHOLE = ("compute", "cache")  # kinds of strategies that let all tokens stay in the prompt
CHOSEN = 4  # samples, where none are asked for

Key = tuple[str, int]  # task and number of a sample
Rows = Mapping[Point, Answer]  # of one sample


@dataclass(frozen=True)
class Overlay:
    """What a point kept of a sample, to be laid over its picture.

    ``shade`` is a picture with one pixel per patch, as a data URI; ``frame`` an SVG path in pixels
    of the sample's picture.
    """

    answer: Answer
    shade: str
    frame: str


@dataclass(frozen=True)
class Card:
    """A strategy on a sample: an overlay per budget, None where it was not measured."""

    strategy: str
    overlays: list[Overlay | None]


@dataclass(frozen=True)
class Drawn:
    """A sample, what the unpruned model said, its picture as a data URI, a card per strategy."""

    asked: Answer
    unpruned: Answer | None
    picture: str
    width: int
    height: int
    cards: list[Card]


@dataclass(frozen=True)
class Gallery:
    """Samples with ``budgets`` to choose from, the largest first; ``note`` says what is missing."""

    budgets: list[str] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    note: str = ""

    @property
    def start(self) -> int:
        """Which budget is shown at first."""
        return len(self.budgets) // 2


def gallery(
    swept: Swept,
    numbers: Sequence[int],
    model: str = "",
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Gallery:
    """Runs the model on samples: the ``numbers`` of every task, or those that tell most.

    Args:
        model: where the model is, if not where the sweep had it.
        tell: is told how many samples are drawn, of how many.

    Raises:
        VTPruneError: the model or the samples are not to be had, or the visual tokens form no grid.
    """
    pruned = [point for point in swept.points if point not in (CEILING, FLOOR)]
    drawable = [point for point in pruned if build(point.strategy).kind not in WHOLE]
    whole = dict.fromkeys(point.strategy for point in pruned if point not in drawable)
    note = f"Not drawn, since all their tokens stay: {', '.join(whole)}." if whole else ""
    if not drawable:
        return Gallery(note=note or "No strategy was measured.")
    if any(task.startswith(LMMS) for task in swept.tasks):
        raise ConfigError("The pictures of lmms-eval's tasks are its own, and not drawn here.")
    keys = asked_for(swept, numbers) if numbers else disagreements(swept, CHOSEN)
    budgets = by_size(swept, drawable)
    seer, drawn = Seer(swept.settings, model), []
    for done, (task, sample) in enumerate(keys):
        tell(done, len(keys))
        rows = {r.point: r for r in swept.answers if (r.task, r.sample) == (task, sample)}
        drawn.append(_drawn(seer, rows, drawable, budgets))
    tell(len(keys), len(keys))
    return Gallery(budgets, drawn, note)


def asked_for(swept: Swept, numbers: Sequence[int]) -> list[Key]:
    """Returns the samples of these numbers, of each task.

    Raises:
        ConfigError: no answer has a number.
    """
    known = {(row.task, row.sample) for row in swept.answers}
    for number in numbers:
        if number not in {sample for _, sample in known}:
            raise ConfigError(
                f"--samples {number}: {swept.path} has no answers to it. Give numbers below "
                f"{swept.settings.limit}."
            )
    return [(task, n) for task in swept.tasks for n in numbers if (task, n) in known]


def disagreements(swept: Swept, n: int) -> list[Key]:
    """Returns the ``n`` samples on which strategies disagree most, of different kinds at first.

    What counts is how evenly right and wrong answers split at each budget.
    """
    verdicts: dict[Key, dict[str, list[Right]]] = {}
    kinds: dict[Key, tuple[str, str]] = {}
    for row in swept.answers:
        if row.point not in (CEILING, FLOOR):
            key = row.task, row.sample
            verdicts.setdefault(key, {}).setdefault(row.budget, []).append(row.right)
            kinds[key] = row.task, row.kind
    order = sorted(verdicts, key=lambda key: (-_evenness(verdicts[key].values()), key[1], key[0]))
    best = {kinds[key]: key for key in reversed(order)}
    leaders = sorted(best.values(), key=order.index)
    return sorted([*leaders, *(key for key in order if key not in leaders)][:n])


def _evenness(verdicts: Collection[Sequence[Right]]) -> float:
    shares = [statistics.fmean(rights) for rights in verdicts]
    return statistics.fmean(share * (1 - share) for share in shares)


def by_size(swept: Swept, points: Sequence[Point]) -> list[str]:
    """Returns the budgets of these points, that which keeps most tokens first."""
    kept: dict[str, list[float]] = {}
    for row in swept.answers:
        if row.point in points:
            kept.setdefault(row.budget, []).append(row.kept)
    return sorted(kept, key=lambda budget: -statistics.fmean(kept[budget]))


def _drawn(seer: Seer, rows: Rows, points: Sequence[Point], budgets: Sequence[str]) -> Drawn:
    """Returns one sample with all its cards."""
    asked = next(iter(rows.values()))
    sample = seer.sample(asked)
    seen: Picture | None = None
    overlays: dict[Point, Overlay] = {}
    for point in (point for point in points if point in rows):
        seen, regions = seer.look(sample, point)
        overlays[point] = Overlay(rows[point], shade(seen, regions), outline(seen, regions))
    if seen is None:
        raise ConfigError(f"Sample {asked.sample} of {asked.task} has no pruned answers.")
    strategies = dict.fromkeys(point.strategy for point in points)
    cards = [Card(s, [overlays.get(Point(s, budget)) for budget in budgets]) for s in strategies]
    height, width = seen.shape[:2]
    picture = data_uri((seen * 255).round().astype(np.uint8))
    return Drawn(asked, rows.get(CEILING), picture, width, height, cards)


def shade(seen: Picture, regions: Regions) -> str:
    """Returns one pixel per patch: dark where it has left, of one color where several are a token.

    What stays as it was is transparent.
    """
    pixels = np.zeros((*regions.shape, 4), dtype=np.uint8)
    pixels[regions < 0] = (0, 0, 0, round(255 * (1 - DIMMED)))
    if merges(regions):
        numbers, patches = np.unique(regions[regions >= 0], return_counts=True)
        joined = np.isin(regions, numbers[patches > 1])
        sizes = zip(regions.shape, seen.shape[:2], strict=True)
        rows, cols = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in sizes)  # middles
        painted = in_mean_color(seen, regions)[rows][:, cols]
        pixels[joined, :3] = (painted[joined] * 255).round()
        pixels[joined, 3] = 255
    return data_uri(pixels)


def outline(seen: Picture, regions: Regions) -> str:
    """Returns the lines between patches of different regions as an SVG path."""
    parts = []
    for (x0, y0), (x1, y1) in frames(regions, seen.shape[:2]):
        end = f"V{y1 + 0.5:.6g}" if x0 == x1 else f"H{x1 + 0.5:.6g}"
        parts.append(f"M{x0 + 0.5:.6g} {y0 + 0.5:.6g}{end}")
    return "".join(parts)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Returns a PNG of ``[H, W, 3]`` or ``[H, W, 4]`` as text that a page can hold."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
