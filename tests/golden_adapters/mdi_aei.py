"""MDI and AEI: attention of generated tokens, heads averaged, steps summed."""

from __future__ import annotations

from typing import Any

from tests.golden_harness import Output, Tensors
from vtprune.scoring.dominance import dominance, stages


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    there, visual = tensors["in.alive"].bool(), tensors["in.modality"].bool()
    text = there & ~visual
    if params["exclude_bos"]:
        text[:, 0] = False
    found = dominance(tensors["in.attn"].mean(2).sum(1), text, there & visual)
    return {
        "out.mdi": found.mdi,
        "out.aei_text": found.aei_text,
        "out.aei_other": found.aei_visual,
        "out.mass_text": found.text,
        "out.stage_mdi": stages(found.mdi),
        "out.stage_aei_text": stages(found.aei_text),
    }
