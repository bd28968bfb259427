"""What a language model looks at, unpruned and with strategies, on the same samples.

Batches are the outer loop, so an interrupted run has all points on the samples so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtprune.engine.onlooker import Onlooker, Seen
from vtprune.engine.plan import find_adapter
from vtprune.engine.wrap import Handle
from vtprune.errors import UnsupportedError
from vtprune.eval.analyze_maps import Album, Map, Maps, grids_of, survivors
from vtprune.eval.analyze_sinks import (
    Grid,
    Place,
    Places,
    discover,
    first_tokens,
    parse_dims,
    score_of,
)
from vtprune.eval.analyze_stats import Figures, Quantities, layers_of, quantities
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.report_overlays import WHOLE
from vtprune.eval.results import Settings
from vtprune.eval.rows import Answer
from vtprune.eval.samples import answer_of
from vtprune.eval.sweep import Batch, Sweep, answer_row
from vtprune.interventions import Intervention
from vtprune.registry import build, read
from vtprune.scoring.sinks import threshold

PROMPTS = 8  # in which sink dimensions are looked for


@dataclass(frozen=True)
class Options:
    """What is asked for beside samples and points.

    Attributes:
        sink_dims: as ``parse_dims`` reads it.
        tau: what the score of a sink exceeds; None = ``threshold``.
        exclude_bos: whether the first token counts as no text.
        draw: samples that are drawn.
    """

    sink_dims: str = "auto"
    tau: float | None = None
    exclude_bos: bool = False
    draw: int = 4


@dataclass(frozen=True)
class Found:
    """One point on ``n`` samples, ``right`` of which (0 to 1) were answered as expected.

    Of ``read_last`` samples no generated token was there to be read, but the prompt's last one.
    """

    strategy: str
    budget: str
    n: int
    right: float
    read_last: int
    layers: list[Figures]
    places: list[Place]
    maps: list[Map]

    @property
    def point(self) -> Point:
        return Point(self.strategy, self.budget)

    @property
    def point_cells(self) -> tuple[str, str]:
        """Strategy and budget, as tables begin."""
        return self.strategy, self.budget


class Tally:
    """What is added up of one point."""

    def __init__(self, point: Point, name: Callable[[int], str]) -> None:
        self.point, self.places, self.maps = point, Places(name), Maps()
        self.quantities: list[Quantities] = []
        self.rights: list[float] = []
        self.read_last = 0

    def found(self) -> Found:
        """Returns the means over the samples so far."""
        n, layers = len(self.rights), layers_of(self.quantities)
        right = sum(self.rights) / n
        where = self.places.top(), self.maps.maps()
        return Found(
            self.point.strategy, self.point.budget, n, right, self.read_last, layers, *where
        )


class Analysis(Sweep):
    """Looks on while the points of a sweep answer its samples."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        points: Sequence[Point],
        settings: Settings,
        options: Options,
        *,
        lenient: bool = False,
    ) -> None:
        """Checks every point against the model, and finds the dimensions of sinks.

        Raises:
            VTPruneError: as ``Sweep`` does, or for dimensions that the model does not have.
        """
        self.options, self.adapter = options, find_adapter(model)
        width = int(self.adapter.language_model.config.hidden_size)
        self.finds, given = parse_dims(options.sink_dims, width)
        super().__init__(model, processor, points, settings, lenient=lenient)
        self.tau = threshold(width) if options.tau is None else options.tau
        self.dims = given
        if self.finds:
            firsts = first_tokens(model, self._first_batch().seeing)
            self.dims = tuple(sorted({*given, *discover(firsts, self.tau)}))
        self.score = score_of(self.dims)
        name = self.processor.tokenizer.convert_ids_to_tokens
        self.tallies = [Tally(point, name) for point in self.points]
        self.album = Album(options.draw, getattr(processor, "image_processor", None))

    def _try(self, point: Point) -> None:
        """Raises VTPruneError also where rows are edited after they were read."""
        super()._try(point)
        name = read(point.strategy)[0]
        with self._wrap(point, 0) as handle:
            rules = [step.stage.rule for step in getattr(handle, "steps", ())]
        if any(isinstance(rule, Intervention) and rule.decoded for rule in rules):
            raise UnsupportedError(
                f"{name} edits the rows of generated tokens, and analyze reads attention as "
                "queries and keys make it, before any edit. Leave it out."
            )

    @property
    def total(self) -> int:
        """How many answers there will be."""
        return self.settings.limit * len(self.points)

    def look(self, advance: Callable[[int], None] = lambda n: None) -> int:
        """Looks at all samples; returns of how many, fewer after Ctrl-C once there are some."""
        done, (task,) = 0, self.tasks
        for first in range(0, self.settings.limit, self.batch):
            end = min(first + self.batch, self.settings.limit)
            try:
                batch = self._load(task, first, end)
                self.album.begin(batch.samples, batch.seeing.get("pixel_values"))
                looked = []
                for point in self.points:
                    looked.append(self.look_at(point, batch))
                    advance(len(batch.samples))
            except KeyboardInterrupt:
                if not done:
                    raise
                return done
            for tally, (rows, seen, left, grids) in zip(self.tallies, looked, strict=True):
                self._add(tally, batch, rows, seen, left, grids)
            done = end
        return done

    def look_at(
        self, point: Point, batch: Batch
    ) -> tuple[list[Answer], Seen, Tensor, list[Grid | None]]:
        """Returns answers, what was seen, who of the visual tokens survived, and their grids."""
        inputs = batch.seeing
        with ExitStack() as undo:
            handle = None
            if point != CEILING:
                handle = undo.enter_context(self._wrap(point, batch.samples[0].index))
                assert isinstance(handle, Handle)  # ViTs have no sweep like this one
            onlooker = Onlooker(self.model, inputs, self.score, handle)
            with onlooker.looking():
                ids = self.model.generate(
                    **inputs,
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                )
            new = ids[:, inputs["input_ids"].shape[1] :]
            seen = onlooker.seen(new, self._ends())
            left = seen.visual if handle is None else survivors(handle, seen)
            grids = grids_of(self.adapter, inputs, seen.visual)
            rows = self._answers(point, batch, new, seen, handle)
            draws = handle is not None and build(point.strategy).kind not in WHOLE
            for b, row in enumerate(rows):
                own = handle if draws else None
                self.album.add(row, own, b, left[b, seen.visual[b]], grids[b])
        return rows, seen, left, grids

    def _answers(
        self, point: Point, batch: Batch, new: Tensor, seen: Seen, handle: Handle | None
    ) -> list[Answer]:
        texts = self.processor.batch_decode(new.cpu(), skip_special_tokens=True)
        counts = [(n, float(n)) for n in seen.visual.sum(1).tolist()]
        if handle is not None:
            report = handle.report()
            counts = [report.of_sample(row) for row in range(len(texts))]
        return [
            answer_row(sample, point, answer_of(text), *count, None)
            for sample, text, count in zip(batch.samples, texts, counts, strict=True)
        ]

    def _add(
        self,
        tally: Tally,
        batch: Batch,
        rows: Sequence[Answer],
        seen: Seen,
        left: Tensor,
        grids: Sequence[Grid | None],
    ) -> None:
        tally.quantities.append(quantities(seen, self.tau, self.options.exclude_bos))
        tally.places.add(seen, batch.seeing["input_ids"].cpu(), grids, self.tau)
        tally.rights += [float(row.right) for row in rows]
        tally.read_last += int((seen.rows == 0).sum())
        if tally.point != CEILING and build(tally.point.strategy).kind not in WHOLE:
            tally.maps.add(left, seen.visual, grids)

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _first_batch(self) -> Batch:
        return self._load(self.tasks[0], 0, min(PROMPTS, self.settings.limit))
