"""Refuses a transformers that lacks what the engine stands on."""

from __future__ import annotations

from importlib.metadata import version

FLOOR = (5, 18)


def check(installed: str) -> None:
    """Raises ImportError when transformers is older than the supported floor."""
    parts = tuple(int(part) for part in installed.split(".")[:2])
    if parts < FLOOR:
        floor = ".".join(map(str, FLOOR))
        raise ImportError(
            f"vtprune needs transformers {floor} or newer (generate() takes encoded images from "
            f"there on); {installed} is installed. Run: pip install 'transformers>={floor}'"
        )


check(version("transformers"))
