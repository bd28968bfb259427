"""Sweeps of benchmarks that lmms-eval brings, or that are described in its form.

A task at a point is one evaluation. It is done once its metrics are in ``metrics.jsonl``; answers
that the task scores from 0 to 1 are rows as of any other sweep.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from vtprune.eval._extras import need
from vtprune.eval.budgets import CEILING, FLOOR, Point
from vtprune.eval.lmms_benchmarks import Benchmark, secluded
from vtprune.eval.lmms_metrics import FILE, Metrics, answers_of, metrics_of
from vtprune.eval.results import Folder
from vtprune.eval.rows import JsonLines, Timing
from vtprune.eval.sweep import Sweep

RESAMPLED = 1000  # times, for the error of a metric that has no formula


class LmmsSweep(Sweep):
    """Lets lmms-eval ask one loaded model, at one point after the other, and score its answers."""

    tasks: list[Benchmark]  # type: ignore[assignment]

    def __init__(self, *args: Any, benchmarks: Sequence[Benchmark], **kwargs: Any) -> None:
        """Takes what ``Sweep`` does, and the tasks that the settings name."""
        self.known = {benchmark.name: benchmark for benchmark in benchmarks}
        super().__init__(*args, **kwargs)

    def _prepare(self) -> None:
        from vtprune.eval.lmms_chat import Chat

        self.chat = Chat(self.model, self.processor, self.settings.batch_size)

    def _check_tasks(self) -> None:
        """Whether its samples have videos is seen when they are asked."""

    @property
    def total(self) -> int:
        return len(self.points) * sum(b.n(self.settings.limit) for b in self.tasks)

    def run(self, folder: Folder, advance: Callable[[int], None] = lambda n: None) -> None:
        """Measures what ``folder`` lacks, of several ranks each its share of the evaluations.

        ``advance`` is told the answers done, by the first rank old ones too, and 0 while it waits.
        """
        self.chat.advance = advance
        metrics = self._metrics(folder)
        done = {(row.task, row.point) for row in metrics.rows}
        pairs = [(benchmark, point) for benchmark in self.tasks for point in self.points]
        missing = [(b, point) for b, point in pairs if (b.name, point) not in done]
        if folder.ranks.first:
            advance(self.total - sum(b.n(self.settings.limit) for b, _ in missing))
        try:
            for benchmark, point in folder.ranks.share(missing):
                self._measure(benchmark, point, folder, metrics)
            self._settle(folder, metrics, lambda: advance(0))
        except KeyboardInterrupt:
            self._settle(folder, metrics)  # launchers interrupt all ranks
            raise

    def _metrics(self, folder: Folder) -> JsonLines[Metrics]:
        """Returns the metrics so far; the first rank puts together what others have left."""
        ranks = folder.ranks
        if not ranks.first:
            ranks.meet("metrics put together")
        found = JsonLines(folder.path / FILE, Metrics, ranks.rank)
        if ranks.first:
            found.gather()
            for note in found.damage:
                warnings.warn(note, stacklevel=2)
            ranks.meet("metrics put together")
        ranks.meet("metrics read")  # until then nobody writes
        return found

    def _settle(
        self,
        folder: Folder,
        metrics: JsonLines[Metrics],
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for all ranks and puts their rows together."""
        self.settle(folder, waiting)
        if folder.ranks.first:
            order = [(benchmark.name, point) for benchmark in self.tasks for point in self.points]
            places = {pair: i for i, pair in enumerate(order)}
            metrics.gather(lambda row: places.get((row.task, row.point), len(places)))

    def _measure(
        self, benchmark: Benchmark, point: Point, folder: Folder, metrics: JsonLines[Metrics]
    ) -> None:
        """Runs one evaluation; its metrics are written last, and say that it is done."""
        results = self.evaluate(benchmark, point)
        name, marks = benchmark.name, (benchmark.name, point.strategy, point.budget)
        folder.answers.append(answers_of(results, name, point, self.chat.replies))
        times, first = [], 0
        for batch in self.chat.batches:
            times.append(Timing(*marks, first, batch.size, batch.took.all))
            first += batch.size
        folder.timings.append(times)
        kept = statistics.fmean(reply.kept for reply in self.chat.replies.values())
        metrics.append(
            [Metrics(*marks, len(self.chat.replies), round(kept, 2), metrics_of(results))]
        )

    def evaluate(self, benchmark: Benchmark, point: Point) -> Mapping[str, Any]:
        """Returns what lmms-eval makes of one task at one point."""
        evaluator = need("lmms_eval.evaluator", extra="lmms")
        self.chat.forget()
        self.chat.blind = point == FLOOR
        plain = point in (CEILING, FLOOR)
        self.chat.wrapping = lambda first: nullcontext() if plain else self._wrap(point, first)
        with secluded():
            return evaluator.simple_evaluate(
                model=self.chat,
                tasks=[benchmark.known_as],
                task_manager=benchmark.manager,
                batch_size=self.settings.batch_size,
                limit=self.settings.limit,
                bootstrap_iters=RESAMPLED,
                use_cache=None,  # its key has neither strategy nor budget of a model in hand
            )
