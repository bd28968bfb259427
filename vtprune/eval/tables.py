"""A sweep's summary as a table for the terminal and for a README."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from vtprune.eval.budgets import BLIND, UNPRUNED
from vtprune.eval.stats import Interval, Summary

FLOPS = "FLOPs, %"  # not on the terminal, where 80 columns are full
COLUMNS = (
    "strategy",
    "budget",
    "accuracy, %\n[95 %]",
    "vs unpruned,\npoints [95 %]",
    "tokens\nkept",
    FLOPS,
    "ms per\nsample",
    "n",
)
CAPTION = (
    "unpruned is every strategy's 100 % point; blind is asked without the image. Accuracy: Wilson "
    "interval; difference: same samples, normal approximation (Bonett and Price). "
    "ms: median over batches of one whole generate call, divided by the batch size."
)
NOTE = (
    "FLOPs: those of the language model's prefill, words too, by the published formulas, in % of "
    "unpruned."
)


def cells(summary: Summary) -> tuple[str, ...]:
    """Returns the texts of one row, in the order of ``COLUMNS``."""
    difference = summary.difference
    return (
        summary.strategy,
        summary.budget,
        points_text(summary.accuracy, ""),
        "" if difference is None else points_text(difference, "+"),
        f"{summary.kept:.4g}",
        "" if summary.flops is None else f"{100 * summary.flops:.1f}",
        "" if summary.ms is None else f"{summary.ms:.1f}",
        str(summary.n),
    )


def rich_table(summaries: Sequence[Summary], title: str) -> Table:
    """Returns the table for the terminal, 80 columns wide, with a gap between strategies."""
    table = Table(
        title=Text(title), caption=CAPTION, caption_justify="left", box=box.SIMPLE, padding=0
    )
    narrow = [i for i, name in enumerate(COLUMNS) if name != FLOPS]
    for i in narrow:
        table.add_column(COLUMNS[i], justify="left" if i == 0 else "right", no_wrap=True)
    for i, summary in enumerate(summaries):
        following = summaries[i + 1 : i + 2]
        ends = bool(following) and following[0].strategy != summary.strategy
        style = "bold" if summary.strategy in (UNPRUNED, BLIND) else None
        texts = cells(summary)
        table.add_row(*(texts[i] for i in narrow), end_section=ends, style=style)
    return table


def markdown(summaries: Sequence[Summary], title: str) -> str:
    """Returns title, table and caption in Markdown."""
    lines = [
        "| " + " | ".join(COLUMNS).replace("\n", " ") + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells(summary)) + " |" for summary in summaries),
    ]
    return f"{title}\n\n" + "\n".join(lines) + f"\n\n{CAPTION} {NOTE}\n"


def points_text(interval: Interval, sign: str) -> str:
    """Returns a share or a difference of shares in per cent, with its interval."""
    value, low, high = (100 * v for v in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
