"""What a handle tells about its last call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageReport:
    """One image: its row in the batch, visual tokens before and after.

    ``short`` says that it had fewer tokens than were to be kept.
    """

    sample: int
    tokens: int
    kept: int
    short: bool


@dataclass(frozen=True)
class Report:
    """The last call of a wrapped model; no images before the first one.

    ``ms`` holds milliseconds per phase when ``Handle.timing`` is on: ``encode`` (tower, projector
    and selection) and ``language`` (everything after).
    """

    strategy: str
    layers: tuple[int, ...]
    images: tuple[ImageReport, ...] = ()
    ms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        reads = f", tower blocks {list(self.layers)}" if self.layers else ""
        lines = [f"{self.strategy}{reads}"]
        for i, image in enumerate(self.images):
            share = 100 * image.kept / image.tokens
            note = " (fewer than asked for)" if image.short else ""
            lines.append(
                f"  image {i} (row {image.sample}): {image.kept} of {image.tokens} visual tokens, "
                f"{share:.1f} %{note}"
            )
        lines += [f"  {phase}: {ms:.1f} ms" for phase, ms in self.ms.items()]
        return "\n".join(lines)
