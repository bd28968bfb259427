"""What caches hold, in summaries, tables and figures."""

from __future__ import annotations

from dataclasses import replace

from vtprune.eval import plots, tables
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.rows import Answer
from vtprune.eval.stats import Summary, summarize

SNAP = Point("snapkv", "16")


def answer(sample: int, point: Point, kept: float, cache: float | None) -> Answer:
    about = ("scenes", sample, "read", point.strategy, point.budget, "q ?", "3", "3", True)
    return Answer(*about, 64, kept, 1.0, cache)


def summaries(cache: float | None, kept: float = 64.0) -> list[Summary]:
    rows = [answer(i, CEILING, 64.0, 1.0) for i in range(4)]
    rows += [answer(i, SNAP, kept, cache and cache + i / 100) for i in range(4)]
    return summarize([CEILING, SNAP], rows, [])


def test_a_summary_is_the_mean_and_not_known_where_one_is_not():
    whole, few = summaries(0.2)
    assert whole.cache == 1.0
    assert few.cache is not None
    assert abs(few.cache - 0.215) < 1e-9
    assert summaries(None)[1].cache is None


def test_a_table_says_it_in_per_cent():
    few = summaries(0.2)[1]
    place = tables.COLUMNS.index(tables.CACHE)
    assert tables.cells(few)[place] == "21.5"
    assert tables.cells(replace(few, cache=None))[place] == ""
    assert len(tables.cells(few)) == len(tables.COLUMNS)
    assert len(tables.cells(few, 1.0)) == len(tables.VIT_COLUMNS)
    assert "| KV cache, % |" in tables.markdown([few], "title")


def test_a_figure_shows_it_where_tokens_do_not():
    """That is where all tokens enter the language model and still caches hold less."""
    assert plots._scales(summaries(0.2), None)[-1] is plots.CACHE
    for others in (summaries(0.2, kept=16.0), summaries(None), summaries(1.0)):
        assert plots.CACHE not in plots._scales(others, None)
