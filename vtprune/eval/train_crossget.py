"""Trains the tokens by which CrossGET guides merges: a ViT is to say with few patches what it says.

Before each block its token is added to the guide, a second [CLS]; nothing else learns. A classifier
is to name the classes and to answer as it does unpruned. Of a pair of two towers the images are to
find their captions, and captions that are wrong about one thing not; so what the guide learns comes
from the text. Patches leave at two paces in turns; which of them merge is not differentiable, but
how much the two of a pair count is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.engine.reduction import reduced
from vtprune.engine.vit_wrap import wrap_vit
from vtprune.eval import train_clip
from vtprune.eval.train_beside import BesideTrainer, served
from vtprune.eval.train_loop import Show, Stage
from vtprune.strategies.crossget import CrossGET
from vtprune.types import Guidance, Selection, Signals

PACES = (1.0, 1.35)  # patches that leave per block, in units of patches / blocks: 50 and 35 %
DISTILLED = 20.0  # what the distance between an image's features counts
OPEN_CLIP = "encode_image"


class Tokens(nn.Module):
    """What the guide gets added before each block, ``[blocks, width]``; at first nothing."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(blocks, width))


@dataclass(frozen=True)
class Learning(CrossGET):
    """CrossGET whose weights say by their gradient what the guide should have thought.

    ``latest`` holds queries, keys and values of the attention that ran last.
    """

    latest: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)

    def select(self, signals: Signals, k: int) -> Selection:
        need = next(need for need in signals.values if isinstance(need, Guidance))
        with torch.enable_grad():
            live = reduced(need, *self.latest[-1], signals.n_prefix, None, None)
            return super().select(replace(signals, values={**signals.values, need: live}), k)


class CrossGETTrainer(BesideTrainer):
    """Trains a token per block of a classifier, or of the image tower of a pair."""

    heads: Tokens

    def __init__(self, model: Any, out: Path, stages: tuple[Stage, ...]) -> None:
        adapter = served(model)
        blocks, n = len(adapter.blocks), adapter.n_patches or 0
        self.paces = [max(1, round(pace * n / blocks)) for pace in PACES]
        heads = Tokens(blocks, adapter.shape.width).to(next(model.parameters()).device)
        super().__init__(model, heads, out, stages)

    @property
    def _is_pair(self) -> bool:
        return hasattr(self.model, OPEN_CLIP)

    def show(self, stage: Stage, n: int) -> Show:
        if self._is_pair:
            return lambda first, size: train_clip.shown(first, n)
        return super().show(stage, n)

    def losses(self, stage: Stage, batch: Any) -> dict[str, Tensor]:
        run = self.model.encode_image if self._is_pair else self.model
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                whole = run(batch.pixels).float()
            with self._merging(self.paces[self.step % len(self.paces)]):
                found = run(batch.pixels).float()
        return self._paired(found, whole, batch) if self._is_pair else _named(found, whole, batch)

    @contextmanager
    def _merging(self, reduce: int) -> Iterator[None]:
        """Lets so many patches leave per block, as the tokens guide."""
        adapter = served(self.model)
        strategy, project = Learning(tokens=self.heads.tokens), adapter.project

        def watched(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            strategy.latest[:] = [project(attention, x)]
            return strategy.latest[0]

        adapter.project = watched
        with wrap_vit(self.model, adapter, strategy, None, reduce, None, {}, {}):
            yield

    def _paired(self, found: Tensor, whole: Tensor, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            text = self.model.encode_text(torch.cat([batch.captions, batch.wrong]))
        apart = 1 - F.cosine_similarity(found, whole, dim=-1).mean()
        contrast = train_clip.contrast(found, text, self.model.logit_scale.exp())
        return {**contrast, "apart": DISTILLED * apart}


def _named(found: Tensor, whole: Tensor, batch: Any) -> dict[str, Tensor]:
    """Losses of logits ``[B, 112]``, beside those of the unpruned model."""
    both = found.log_softmax(-1), whole.log_softmax(-1)
    right = found.argmax(-1) == batch.share.argmax(-1)
    return {
        "class": F.cross_entropy(found, batch.share),
        "answer": F.kl_div(*both, reduction="batchmean", log_target=True),
        "class_acc": right.float().mean(),
    }
