"""What a handle tells about its last call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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

    ``tokens`` visual tokens of the row reach ``layer`` (0-based), ``kept`` of them enter it.
    """

    layer: int
    sample: int
    tokens: int
    kept: int


@dataclass(frozen=True)
class Report:
    """The last call of a wrapped model; no images before the first one.

    ``ms`` holds milliseconds per phase when ``Handle.timing`` is on: ``encode`` (tower, projector
    and selection) and ``language`` (everything after).
    """

    strategy: str
    layers: tuple[int, ...]
    images: tuple[ImageReport, ...] = ()
    stages: tuple[StageReport, ...] = ()
    decoder_layers: int = 0
    ms: Mapping[str, float] = field(default_factory=dict)

    def of_sample(self, sample: int) -> tuple[int, float]:
        """Returns a row's visual tokens, and how many of them enter a decoder layer, on average."""
        images = [image for image in self.images if image.sample == sample]
        tokens = sum(image.tokens for image in images)
        left, total, since = float(sum(image.kept for image in images)), 0.0, 0
        for stage in self.stages:
            if stage.sample == sample:
                total += left * (stage.layer - since)
                left, since = float(stage.kept), stage.layer
        if not since:
            return tokens, left
        return tokens, (total + left * (self.decoder_layers - since)) / self.decoder_layers

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
        lines += [f"  {phase}: {ms:.1f} ms" for phase, ms in self.ms.items()]
        return "\n".join(lines)
