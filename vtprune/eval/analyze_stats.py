"""From what was seen of each sample to the figures of a layer: sinks, dominance, entropy.

NL layers, B samples of a batch, S samples in all, L columns of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vtprune.engine.onlooker import Seen
from vtprune.scoring.dominance import dominance, stages

STAGES = ("early", "middle", "late")


@dataclass(frozen=True)
class Figures:
    """Means over samples, of one layer or of a stage; None where no sample has the quantity.

    Of a stage they are the means of its layers: early is the first two, middle the middle two, late
    the last two.

    Attributes:
        text, visual: tokens that the rows can attend to.
        mdi: attention per text token over that per visual token, mean of the samples' ratios;
            ``mdi_of_means`` the ratio of the two means.
        aei_text, aei_visual: share of attention over share of tokens, likewise.
        entropy: of the rows, in nats, mean over heads.
        text_sinks, visual_sinks: sinks among the tokens that enter the layer.
        to_text_sinks, to_visual_sinks: shares of the rows' attention that these draw, 0 to 1; not
            known of visual ones where heads hold different tokens.
        to_first: share that the first token of the prompt draws.
    """

    text: float | None
    visual: float | None
    mdi: float | None
    mdi_of_means: float | None
    aei_text: float | None
    aei_text_of_means: float | None
    aei_visual: float | None
    aei_visual_of_means: float | None
    entropy: float | None
    text_sinks: float | None
    visual_sinks: float | None
    to_text_sinks: float | None
    to_visual_sinks: float | None
    to_first: float | None


NAMES = tuple(field.name for field in fields(Figures))
# Ratio of means -> the two quantities of a sample whose means it divides.
RATIOS = {
    "mdi_of_means": ("per_text", "per_visual"),
    "aei_text_of_means": ("attention_text", "share_text"),
    "aei_visual_of_means": ("attention_visual", "share_visual"),
}

Quantities = dict[str, Tensor]  # of each sample, ``[NL, S]`` float32


def quantities(seen: Seen, tau: float, exclude_bos: bool = False) -> Quantities:
    """Returns what ``Figures`` are means of, for each sample of a batch, ``[NL, B]``.

    Args:
        tau: what a sink's score exceeds.
        exclude_bos: whether the first token of a prompt counts neither as text nor as visual.
    """
    layers, batch, _ = seen.attention.shape
    visual = seen.there & seen.visual
    text = seen.there & seen.valid & ~seen.visual
    first = torch.arange(seen.valid.shape[1]) == seen.valid.float().argmax(1)[:, None]
    counted = text & ~first if exclude_bos else text
    found = dominance(*(x.flatten(0, 1) for x in (seen.attention, counted, visual)))
    numbers = [x.sum(-1).float() for x in (counted, visual)]
    shares = found.text.view(layers, batch), (1 - found.text).view(layers, batch)
    both = numbers[0] + numbers[1]
    sinks = sinks_of(seen, tau)
    marks = {"text_sinks": sinks & ~seen.visual, "visual_sinks": sinks & seen.visual}
    masses = [(seen.attention * kind).sum(-1) for kind in (counted, visual)]
    made = {
        "text": numbers[0],
        "visual": numbers[1],
        "mdi": found.mdi.view(layers, batch),
        "aei_text": found.aei_text.view(layers, batch),
        "aei_visual": found.aei_visual.view(layers, batch),
        "entropy": seen.entropy,
        **{name: mark.sum(-1).float() for name, mark in marks.items()},
        **{f"to_{name}": (seen.attention * mark).sum(-1) for name, mark in marks.items()},
        "to_first": (seen.attention * first).sum(-1),
        "per_text": masses[0] / numbers[0],
        "per_visual": masses[1] / numbers[1],
        "attention_text": shares[0],
        "attention_visual": shares[1],
        "share_text": numbers[0] / both,
        "share_visual": numbers[1] / both,
    }
    made["to_visual_sinks"] = made["to_visual_sinks"].masked_fill(seen.mixed[:, None], torch.nan)
    return {name: value.masked_fill(~value.isfinite(), torch.nan) for name, value in made.items()}


def sinks_of(seen: Seen, tau: float) -> Tensor:
    """Returns which tokens that enter a layer are sinks, ``[NL, B, L]`` bool."""
    return seen.valid & (seen.scores > tau)  # what is not there has no score: NaN exceeds nothing


def layers_of(batches: Sequence[Quantities]) -> list[Figures]:
    """Returns the figures of each layer from the quantities of all batches."""
    every = {name: torch.cat([found[name] for found in batches], dim=1) for name in batches[0]}
    means = {name: value.nanmean(1) for name, value in every.items()}
    for name, parts in RATIOS.items():
        above, below = (every[part] for part in parts)
        both = ~(above.isnan() | below.isnan())  # the same samples in both means
        top, bottom = (x.masked_fill(~both, torch.nan).nanmean(1) for x in (above, below))
        means[name] = top / bottom
    return [_figures(means, number) for number in range(len(means["mdi"]))]


def stages_of(layers: Sequence[Figures]) -> list[Figures]:
    """Returns the figures of ``STAGES``; a stage of which a layer lacks one lacks it too."""
    values = {
        name: torch.tensor([math.nan if (v := getattr(x, name)) is None else v for x in layers])
        for name in NAMES
    }
    means = {name: stages(value) for name, value in values.items()}
    return [_figures(means, number) for number in range(len(STAGES))]


def _figures(means: Mapping[str, Tensor], number: int) -> Figures:
    values = {name: float(means[name][number]) for name in NAMES}
    return Figures(**{name: v if math.isfinite(v) else None for name, v in values.items()})
