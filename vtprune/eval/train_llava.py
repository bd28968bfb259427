"""Trains the shipped LLaVA on generated scenes: first to see, then to answer.

    python -m vtprune.eval.train_llava --out runs/mini-llava

Stages, each resumed from its last checkpoint when the command is given again:

1. ``dense``: the vision tower alone, on images full of things; targets per patch (what is here, in
   which color) and per image (what is present), the latter read from the CLS of the block that
   yields the features, so that CLS attention points at content.
2. ``sparse``: the same on the scenes as they are asked about.
3. ``answer``: projector and language model on questions, tower frozen.
4. ``joint``: everything, with the tower's targets kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.eval import scenes, train_attention
from vtprune.eval.mini_llava import build_model, build_processor
from vtprune.eval.train_data import Batch, Writer
from vtprune.eval.train_losses import (
    Heads,
    Words,
    answering_loss,
    lookup,
    see,
    seeing_loss,
    sum_losses,
)

MIXED = ("standard", "hard", "standard", "easy")


@dataclass(frozen=True)
class Stage:
    """``train`` lists which parts learn: ``tower``, ``llm`` (projector included)."""

    name: str
    steps: int
    lr: float
    train: tuple[str, ...]
    levels: tuple[str | scenes.Level, ...] = MIXED
    batch: int = 32
    tower_lr: float = 1.0  # of ``lr``


STAGES = (
    Stage("dense", 1200, 1.5e-3, ("tower",), (scenes.DENSE,)),
    Stage("sparse", 900, 1e-3, ("tower",)),
    Stage("answer", 4800, 1.2e-3, ("llm",), batch=8),
    Stage("joint", 1600, 5e-4, ("tower", "llm"), batch=8, tower_lr=0.3),
)


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, cosine decay to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """Runs the stages, writes ``log.jsonl`` and ``checkpoint.pt`` to ``out``, resumes from them."""

    def __init__(self, out: Path, minutes: float, device: torch.device) -> None:
        self.out, self.device = out, device
        self.save_every = 60 * minutes
        self.processor = build_processor()
        self.model = cast(LlavaForConditionalGeneration, nn.Module.to(build_model(), device))
        self.heads = Heads().to(device)
        self.words = Words.of(self.processor.tokenizer, device)
        train_attention.use(self.model)
        train_attention.watch(lookup(self.model))
        self.stage, self.step, self.optimizer_state = 0, 0, None
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load(torch.load(out / "checkpoint.pt", map_location=device, weights_only=True))

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step = state["stage"], state["step"]
        self.optimizer_state = state["optimizer"]

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")  # a kill in between leaves the old one whole

    def run(self) -> None:
        while self.stage < len(STAGES):
            self._run_stage(STAGES[self.stage])
            self.stage, self.step, self.optimizer_state = self.stage + 1, 0, None
        self.model.save_pretrained(self.out / "model")
        self.processor.save_pretrained(self.out / "model")

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Freezes what the stage leaves alone; returns the rest as groups with a peak rate."""
        parts: dict[str, list[nn.Parameter]] = {"tower": [], "llm": []}
        for name, parameter in [*self.model.named_parameters(), *self.heads.named_parameters()]:
            is_llm = "language_model" in name or "projector" in name or name.startswith("lm_head")
            part = "llm" if is_llm else "tower"
            parameter.requires_grad_(part in stage.train)
            parts[part].append(parameter)
        peaks = {"tower": stage.lr * stage.tower_lr, "llm": stage.lr}
        return [{"params": parts[part], "peak": peaks[part]} for part in stage.train]

    def _run_stage(self, stage: Stage) -> None:
        groups = self._groups(stage)
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        writer = Writer(self.processor, stage.levels, stage.batch)
        offset = 10_000_000 * self.stage
        saved = time.monotonic()
        sums: dict[str, list[float]] = defaultdict(list)
        while self.step < stage.steps:
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(self.step, stage.steps)
            batch = writer(self.step, offset).to(self.device)
            values = self._losses(stage, batch)
            loss = sum_losses(values)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            self.step += 1
            for name, value in values.items():
                sums[name].append(float(value.detach()))
            sums["images_per_s"].append(stage.batch / (time.monotonic() - began))
            if self.step % 25 == 0:
                self._log(stage, sums)
                sums.clear()
            if time.monotonic() - saved > self.save_every or self.step == stage.steps:
                self._save(optimizer)
                saved = time.monotonic()

    def _losses(self, stage: Stage, batch: Batch) -> dict[str, Tensor]:
        train_tower, train_llm = "tower" in stage.train, "llm" in stage.train
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.set_grad_enabled(train_tower):
                states, last = see(self.model, batch.pixels)
            values: dict[str, Tensor] = {}
            if train_tower:
                values = seeing_loss(self.heads, states, batch)
                late = seeing_loss(self.heads, last, batch)
                values["late"] = 0.25 * sum_losses(late)
            if train_llm:
                values |= answering_loss(self.model, states[:, 1:], batch, self.words)
        return values

    def _log(self, stage: Stage, sums: dict[str, list[float]]) -> None:
        row = {"stage": stage.name, "step": self.step}
        row |= {name: round(_mean(v), 4) for name, v in sums.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]  # a batch may lack what an accuracy is about
    return sum(known) / max(1, len(known))


def main() -> None:
    """Trains, or goes on training."""
    parser = argparse.ArgumentParser(description="Trains the shipped LLaVA.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    Trainer(args.out, args.checkpoint_minutes, device).run()


if __name__ == "__main__":
    main()
