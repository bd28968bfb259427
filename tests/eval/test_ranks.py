"""Several ranks write what one process writes, whoever dies when; here ranks are threads."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.eval.test_results import SETTINGS, answer
from vtprune import ConfigError
from vtprune.eval.budgets import Point, points
from vtprune.eval.ranks import Ranks, distributed
from vtprune.eval.results import Folder
from vtprune.eval.rows import Answer, JsonLines
from vtprune.eval.samples import Sample, Task
from vtprune.eval.sweep import Sweep, answer_row

TASKS = ("read", "count")
POINTS = points(["random", "strided"], ["25%", "4"])
LIMIT, SIZE = 11, 2
SWEPT = replace(SETTINGS, task=",".join(TASKS), limit=LIMIT, batch_size=SIZE)


class Killed(BaseException):
    """What ends a thread as SIGKILL ends a process: nobody handles it."""


def load(task: str, first: int, end: int) -> list[Sample]:
    image = Image.new("RGB", (1, 1))
    return [Sample(task, n, "kind", image, f"{task} {n} ?", str(n % 3)) for n in range(first, end)]


class Counting(Sweep):
    """Answers without a model, and remembers the batches; dies after ``life`` measurements."""

    def __init__(self, chosen=POINTS, life: int | None = None) -> None:
        self.points, self.settings, self.life = tuple(chosen), SWEPT, life
        self.tasks = [Task(name, "", partial(load, name)) for name in TASKS]
        self.measured: list[tuple[str, int, Point]] = []

    def _load(self, task, first, end):
        return SimpleNamespace(samples=task.load(first, end))

    def _warm_up(self, batch):
        pass

    def measure(self, point, batch):
        if len(self.measured) == self.life:
            raise Killed
        first = batch.samples[0]
        self.measured.append((first.task, first.index, point))
        drawn = random.Random(f"{first.index} {point}")  # by the batch, as strategies that draw
        rows = [answer_row(s, point, str(drawn.randrange(3)), 9, 1.5, None) for s in batch.samples]
        return rows, random.random()


class Watched(Ranks):
    """Dies where it waits for one that is dead, as a launcher would have it."""

    def __init__(self, rank: int, world: int, store: Any, dead: threading.Event) -> None:
        super().__init__(rank, world, rank, store)
        self.dead = dead

    def meet(self, where, waiting=lambda: None):
        def look():
            waiting()
            if self.dead.is_set():
                raise Killed

        super().meet(where, look)


def world(n: int) -> list[Ranks]:
    store = distributed.HashStore()
    return [Ranks(rank, n, rank, store) for rank in range(n)]


@pytest.fixture(autouse=True, scope="module")
def impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtprune.eval.ranks.PAUSE", 0.002)
        yield


def run(path: Path, lives: list[int | None], chosen=POINTS) -> list[Counting]:
    """Runs a rank per entry, which says after how many measurements it dies; None = it does not."""
    sweeps, dead = [Counting(chosen, life) for life in lives], threading.Event()
    store = distributed.HashStore()

    def one(rank: int) -> None:
        ranks, folder = Watched(rank, len(lives), store, dead), None
        try:
            folder = Folder(path, SWEPT, ranks)
            sweeps[rank].run(folder)
        except Killed:
            dead.set()
        finally:
            if folder is not None:
                folder.close()

    with ThreadPoolExecutor(len(lives)) as pool:
        list(pool.map(one, range(len(lives))))
    return sweeps


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of one process that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole")
    run(path, [None])
    return {name: (path / name).read_bytes() for name in ("results.jsonl", "timings.jsonl")}


def batches(times: bytes) -> list[tuple]:
    return [tuple(json.loads(line).values())[:-1] for line in times.splitlines()]


def check(path: Path, whole: dict[str, bytes]) -> None:
    assert (path / "results.jsonl").read_bytes() == whole["results.jsonl"]
    assert batches((path / "timings.jsonl").read_bytes()) == batches(whole["timings.jsonl"])
    assert not list(path.glob("*.rank-*.jsonl"))
    assert not list(path.glob("*.partial"))


def test_one_process_writes_in_the_order_of_its_work(whole):
    found = [json.loads(line) for line in whole["results.jsonl"].splitlines()]
    keys = [
        (task, first, p.strategy, p.budget, n)
        for task in TASKS
        for first in range(0, LIMIT, SIZE)
        for p in POINTS
        for n in range(first, min(first + SIZE, LIMIT))
    ]
    names = ("task", "strategy", "budget", "sample")
    wanted = [dict(zip(names, (t, s, b, n), strict=True)) for t, _, s, b, n in keys]
    assert [{name: row[name] for name in names} for row in found] == wanted


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_ranks_share_the_batches(whole, tmp_path, n):
    sweeps = run(tmp_path, [None] * n)
    check(tmp_path, whole)
    each = [{(task, first) for task, first, _ in sweep.measured} for sweep in sweeps]
    n_batches = len(TASKS) * -(-LIMIT // SIZE)
    assert sum(map(len, each)) == len(set().union(*each)) == n_batches
    assert max(map(len, each)) - min(map(len, each)) <= 1
    assert sum(len(sweep.measured) for sweep in sweeps) == n_batches * len(POINTS)


@pytest.mark.parametrize("seed", range(25))
def test_killed_at_random_and_resumed(whole, tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        lives = [draw.choice([None, draw.randint(0, 40)]) for _ in range(draw.randint(1, 4))]
        run(tmp_path, lives)
    run(tmp_path, [None] * draw.randint(1, 3))
    check(tmp_path, whole)


def test_what_is_left_is_shared_anew(tmp_path):
    run(tmp_path, [None, 0])  # the second does nothing
    sweeps = run(tmp_path, [None, None])
    assert [len(sweep.measured) for sweep in sweeps] == [3 * len(POINTS)] * 2


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_half_a_row_of_a_rank_is_measured_again(whole, tmp_path, cut):
    run(tmp_path, [0, None])
    part = tmp_path / "results.rank-1.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    folder = Folder(tmp_path, SWEPT)
    assert folder.damage == []
    folder.close()
    run(tmp_path, [None])
    check(tmp_path, whole)


def test_damage_in_a_rank_s_file_is_said(whole, tmp_path):
    run(tmp_path, [0, None])
    part = tmp_path / "results.rank-1.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:3], b"{nonsense}\n", *lines[4:]]))
    folder = Folder(tmp_path, SWEPT)
    (said,) = folder.damage
    assert "results.rank-1.jsonl is damaged after line 3" in said
    assert len(folder.answers.rows) == 3
    folder.close()
    assert (tmp_path / "results.rank-1.jsonl.damaged").read_bytes().startswith(b"{nonsense}")
    run(tmp_path, [None, None])
    check(tmp_path, whole)


@pytest.mark.parametrize("moment", ["replace", "unlink"])
@pytest.mark.parametrize("times", range(4))
def test_death_while_files_are_put_together(whole, tmp_path, monkeypatch, moment, times):
    """Before the whole file is in its place, and before those of the ranks are removed."""
    run(tmp_path, [None, 30])
    real, calls = getattr(Path, moment), []

    def dies(self, *args, **more):
        if ".jsonl" in self.name and not self.name.endswith("results.jsonl.damaged"):
            calls.append(self.name)
            if len(calls) > times:
                raise Killed
        return real(self, *args, **more)

    monkeypatch.setattr(Path, moment, dies)
    try:
        with pytest.raises(Killed):
            for _ in range(3):  # on opening, or at the end
                folder = Folder(tmp_path, SWEPT)
                try:
                    Counting().run(folder)
                finally:
                    folder.close()
                (tmp_path / "results.rank-7.jsonl").write_text("")
    finally:
        monkeypatch.undo()
    assert len(calls) == times + 1
    run(tmp_path, [None])
    check(tmp_path, whole)


def test_a_full_disk_while_files_are_put_together(whole, tmp_path, monkeypatch):
    run(tmp_path, [None, 30])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert "results.rank-1.jsonl" in before

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtprune.eval.rows.write_whole", full)
    with pytest.raises(ConfigError, match=r"results\.jsonl cannot be written: No space left"):
        Folder(tmp_path, SWEPT)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    monkeypatch.undo()
    run(tmp_path, [None])
    check(tmp_path, whole)


def test_what_is_asked_comes_first(tmp_path):
    run(tmp_path / "few", [None], points(["strided"], ["4"]))
    few = (tmp_path / "few" / "results.jsonl").read_bytes()
    more = points(["random", "strided"], ["25%", "4"])
    run(tmp_path / "both", [None, None], more)
    run(tmp_path / "both", [None, None], points(["strided"], ["4"]))
    both = (tmp_path / "both" / "results.jsonl").read_bytes()
    assert both.startswith(few)
    rest = [json.loads(line) for line in both[len(few) :].splitlines()]
    first = [(r["strategy"], r["budget"]) for r in rest if r["task"] == "read" and r["sample"] == 0]
    assert first == [("random", "25%"), ("random", "4"), ("strided", "25%")]
    run(tmp_path / "both", [None], more)
    run(tmp_path / "whole", [None], more)
    whole = (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert (tmp_path / "both" / "results.jsonl").read_bytes() == whole


def test_rows_are_written_once(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl", Answer)
    lines.append([answer(0), answer(1)])
    lines.append([answer(1), answer(2)])
    assert [row.sample for row in lines.rows] == [0, 1, 2]
    assert [json.loads(line)["sample"] for line in lines.path.open()] == [0, 1, 2]


def test_a_rank_that_outlived_its_first_one_keeps_the_folder(tmp_path):
    opened, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def hold(ranks):
        folder = Folder(tmp_path, SETTINGS, ranks)
        opened.wait()
        leave[ranks.rank].wait()
        folder.close()

    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(hold, ranks) for ranks in world(2)]
        opened.wait()
        for i in range(2):
            with pytest.raises(ConfigError, match="Another sweep is writing"):
                Folder(tmp_path, SETTINGS)
            leave[i].set()
            held[i].result()
    Folder(tmp_path, SETTINGS).close()


def test_a_folder_that_ranks_do_not_share(tmp_path):
    ranks = world(2)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(Folder, tmp_path / "a", SETTINGS, ranks[0])
        there = pool.submit(Folder, tmp_path / "b", SETTINGS, ranks[1])
        with pytest.raises(ConfigError, match="Rank 1 does not find what the first rank wrote"):
            there.result()
        ranks[1].meet("read by all")  # lets the first go


def test_an_interruption_keeps_what_all_have(tmp_path, monkeypatch):
    def interrupted(self, point, batch):
        if len(self.measured) == 5:
            raise KeyboardInterrupt
        return Counting.measure(self, point, batch)

    class Interrupted(Counting):
        measure = interrupted

    def one(ranks):
        folder = Folder(tmp_path, SWEPT, ranks)
        with pytest.raises(KeyboardInterrupt):
            Interrupted().run(folder)
        rows = len(folder.answers.rows)
        folder.close()
        return rows

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, world(2)))
    assert found == [20, 10]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 20
    assert not list(tmp_path.glob("*.rank-*.jsonl"))
