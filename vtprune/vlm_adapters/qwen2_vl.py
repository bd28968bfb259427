"""Qwen2-VL: every block of the tower sees the whole image."""

from __future__ import annotations

from typing import ClassVar

from vtprune.vlm_adapters._qwen import QwenVL


class Qwen2VL(QwenVL):
    """All is as in the other Qwen-VLs."""

    classes: ClassVar = ("Qwen2VLForConditionalGeneration",)
    title: ClassVar = "Qwen2-VL"
