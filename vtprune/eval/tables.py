"""A sweep's summary as a table for the terminal and for a README."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from vtprune.eval.budgets import BLIND, UNPRUNED
from vtprune.eval.stats import Interval, Summary

FLOPS, CACHE = "FLOPs, %", "KV cache, %"  # not on the terminal, where 80 columns are full
COLUMNS = (
    "strategy",
    "budget",
    "accuracy, %\n[95 %]",
    "vs unpruned,\npoints [95 %]",
    "tokens\nkept",
    FLOPS,
    CACHE,
    "ms per\nsample",
    "n",
)
VIT_COLUMNS = (
    "strategy",
    "budget",
    "right, %\n[95 %]",
    "vs unpruned,\npoints [95 %]",
    "tokens\nleft",
    "GFLOPs",
    "images\nper s",
    "n",
)
HOW = (
    "Accuracy: Wilson interval; difference: same samples, normal approximation (Bonett and Price)."
)
CAPTION = (
    f"unpruned is every strategy's 100 % point; blind is asked without the image. {HOW} "
    "ms: median over batches of one whole generate call, divided by the batch size."
)
NOTE = (
    "FLOPs: those of the language model's prefill, words too, by the published formulas, in % of "
    "unpruned. KV cache: bytes of keys and values after the prefill, words too, in % of unpruned."
)
VIT_CAPTION = (
    f"unpruned is every strategy's 100 % point. {HOW} GFLOPs: of the blocks per image, by the "
    "published formulas, two per multiply-accumulate. Images per s: of the median batch, pixels to "
    "outputs."
)


def cells(summary: Summary, gflops: float | None = None) -> tuple[str, ...]:
    """Returns the texts of one row, in the order of ``COLUMNS``, or ``VIT_COLUMNS`` of a ViT.

    Args:
        gflops: of the unpruned tower, where a ViT was measured.
    """
    difference = summary.difference
    cost = pace = ""
    held = "" if summary.cache is None else f"{100 * summary.cache:.1f}"
    if summary.flops is not None:
        whole, digits = (100.0, 1) if gflops is None else (gflops, 3)
        cost = f"{whole * summary.flops:.{digits}f}"
    if summary.ms is not None:
        pace = f"{summary.ms:.1f}" if gflops is None else f"{1000 / summary.ms:.0f}"
    return (
        summary.strategy,
        summary.budget,
        points_text(summary.accuracy, ""),
        "" if difference is None else points_text(difference, "+"),
        f"{summary.kept:.4g}",
        *((cost, held) if gflops is None else (cost,)),
        pace,
        str(summary.n),
    )


def rich_table(summaries: Sequence[Summary], title: str, gflops: float | None = None) -> Table:
    """Returns the table for the terminal, 80 columns wide, with a gap between strategies."""
    names, caption = (COLUMNS, CAPTION) if gflops is None else (VIT_COLUMNS, VIT_CAPTION)
    table = Table(
        title=Text(title), caption=caption, caption_justify="left", box=box.SIMPLE, padding=0
    )
    left_out = (FLOPS, CACHE) if gflops is None else ("n",)
    narrow = [i for i, name in enumerate(names) if name not in left_out]
    for i in narrow:
        table.add_column(names[i], justify="left" if i == 0 else "right", no_wrap=True)
    for i, summary in enumerate(summaries):
        following = summaries[i + 1 : i + 2]
        ends = bool(following) and following[0].strategy != summary.strategy
        style = "bold" if summary.strategy in (UNPRUNED, BLIND) else None
        texts = cells(summary, gflops)
        table.add_row(*(texts[i] for i in narrow), end_section=ends, style=style)
    return table


def markdown(summaries: Sequence[Summary], title: str, gflops: float | None = None) -> str:
    """Returns title, table and caption in Markdown."""
    names = COLUMNS if gflops is None else VIT_COLUMNS
    lines = [
        "| " + " | ".join(names).replace("\n", " ") + " |",
        "|---|" + "---:|" * (len(names) - 1),
        *("| " + " | ".join(cells(summary, gflops)) + " |" for summary in summaries),
    ]
    caption = f"{CAPTION} {NOTE}" if gflops is None else VIT_CAPTION
    return f"{title}\n\n" + "\n".join(lines) + f"\n\n{caption}\n"


def points_text(interval: Interval, sign: str) -> str:
    """Returns a share or a difference of shares in per cent, with its interval."""
    value, low, high = (100 * v for v in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
