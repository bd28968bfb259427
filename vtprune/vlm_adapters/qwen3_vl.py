"""Qwen3-VL: features of several tower blocks join the first layers of the language model."""

from __future__ import annotations

from typing import ClassVar

from vtprune.vlm_adapters._qwen import QwenVL


class Qwen3VL(QwenVL):
    """DeepStack: those layers see every token, so stages inside begin after them."""

    classes: ClassVar = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")
    title: ClassVar = "Qwen3-VL"

    @property
    def n_planes(self) -> int:
        return len(self.base.visual.deepstack_visual_indexes)
