"""Decoding against, or with, another view of the image, and pruning by two passes.

Runs offline on the shipped model: DAMRO takes off the logits of a view that holds little but what
[CLS] attends to, AGLA adds those of an image without what the question is not about, and CARVE
keeps the tokens that the question draws more attention to than a general instruction does. How many
of the scenes' questions each answers right.

    python benchmarks/contrastive.py --scenes 96
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import vtprune
from vtprune.contrast import (
    AttentionSaliency,
    ContrastiveDecoder,
    Given,
    masked,
    relevance,
)
from vtprune.contrast.carve import GENERAL
from vtprune.eval import load
from vtprune.eval.samples import MAX_NEW_TOKENS, TASKS, Asker, Sample, answer_of

Ids = Any
Way = Callable[[list[Sample]], Ids]


def main() -> None:
    """Prints one line per way of decoding."""
    parser = argparse.ArgumentParser(description="Decodes with two views.")
    parser.add_argument("--model", default="mini-llava", help="shipped model (%(default)s)")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--alpha", type=float, default=0.5, help="of DAMRO (%(default)s)")
    parser.add_argument("--keep", type=int, default=32, help="tokens left by CARVE (%(default)s)")
    args = parser.parse_args()

    model, processor = load(args.model)
    ask, settings = Asker(processor), {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    saliency = AttentionSaliency(model, processor)

    def batch(samples: list[Sample], question: str | None = None) -> dict[str, Any]:
        return ask([question or s.question for s in samples], [s.image for s in samples])

    def plain(samples: list[Sample]) -> Ids:
        return model.generate(**batch(samples), **settings)

    def damro(samples: list[Sample]) -> Ids:
        inputs = batch(samples)
        with ContrastiveDecoder(model, inputs, "damro", keep=4, alpha=args.alpha) as decoder:
            return model.generate(**inputs, logits_processor=[decoder], **settings)

    def agla(samples: list[Sample]) -> Ids:
        images = [masked(s.image, saliency(s.image, s.question)) for s in samples]
        view = ask([s.question for s in samples], images)
        with ContrastiveDecoder(model, view, alpha=2.0, beta=0.5, sign=1) as decoder:
            return model.generate(**batch(samples), logits_processor=[decoder], **settings)

    def carve(samples: list[Sample]) -> Ids:
        inputs = batch(samples)
        found = relevance(model, inputs, batch(samples, GENERAL), steps="first")
        scores = [look.attention[0, 0] for look in found]
        with vtprune.wrap(model, Given(scores), keep=args.keep):
            return model.generate(**inputs, **settings)

    def fastervlm(samples: list[Sample]) -> Ids:
        with vtprune.wrap(model, "fastervlm", keep=args.keep):
            return model.generate(**batch(samples), **settings)

    samples = TASKS["scenes"].load(0, args.scenes)
    ways: dict[str, Way] = {"plain": plain, "DAMRO": damro, "AGLA": agla}
    ways |= {f"CARVE, {args.keep} tokens": carve, f"fastervlm, {args.keep} tokens": fastervlm}
    for name, way in ways.items():
        right = 0
        for first in range(0, len(samples), 16):
            some = samples[first : first + 16]
            length = batch(some)["input_ids"].shape[1]
            texts = processor.batch_decode(way(some)[:, length:], skip_special_tokens=True)
            right += sum(answer_of(t) == s.expected for t, s in zip(texts, some, strict=True))
        print(f"{name:22} {right:4} of {len(samples)} right", flush=True)


if __name__ == "__main__":
    main()
