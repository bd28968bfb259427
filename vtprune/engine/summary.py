"""The report of a handle's last call, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.engine.report import ImageReport, Report

if TYPE_CHECKING:
    from vtprune.engine.wrap import Handle

PHASES = ("encode", "language")


def report_of(handle: Handle) -> Report:
    """Returns what the last call kept, per image, and what is known of its costs."""
    prompt, decoding, steps = handle._prompt, handle._decoding, handle.steps
    measured, wanted = handle._measured, [step.wanted for step in steps]
    samples = [] if prompt is None else prompt.sample
    images = tuple(
        ImageReport(row, s.n, s.rows.shape[1], max(wanted) > s.n, *item.describe(s))
        for row, s, item in zip(samples, handle.selections, handle._items, strict=True)
    )
    ms = {} if measured.clock is None else measured.clock.ms
    text = [] if prompt is None else prompt.valid.sum(1).tolist()
    for image in images:
        text[image.sample] -= image.tokens
    return Report(
        " + ".join(dict.fromkeys(repr(step.strategy) for step in steps)),
        tuple(sorted({need.layer for step in steps for need in step.stage.tower_needs})),
        images,
        () if decoding is None else tuple(decoding.left),
        len(handle.adapter.decoder),
        {phase: ms[phase] for phase in PHASES if phase in ms},
        handle._intervening.report(decoding),
        text=tuple(text),
        tiles=measured.tiles,
        cache=measured.cache,
        parts={part: value for part, value in ms.items() if part not in PHASES},
        held=() if decoding is None else tuple(decoding.caches),
        config=handle.adapter.language_model.config,
    )
