"""The loop that trains a shipped model: stages, rates, checkpoints, a log."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.eval import scenes
from vtprune.eval.scene_things import SIZE
from vtprune.eval.train_data import Writer

Show = Callable[[int, tuple[int, int]], Any]
MIXED = ("standard", "hard", "standard", "easy")


@dataclass(frozen=True)
class Stage:
    """``train`` lists which parts learn: ``tower``, ``llm`` (a projector included).

    A batch goes through the model ``part`` images at a time, 0 = all at once. The ``sizes``
    (height, width) of the images take turns, one per step. With ``crop`` the tower sees squares of
    so many pixels instead of the whole.
    """

    name: str
    steps: int
    lr: float
    train: tuple[str, ...]
    levels: tuple[str | scenes.Level, ...] = MIXED
    batch: int = 32
    part: int = 0
    tower_lr: float = 1.0  # of ``lr``
    warmup: int = 100
    sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)
    crop: int = 0


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, cosine decay to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def sum_losses(values: dict[str, Tensor]) -> Tensor:
    """Adds up what is a loss; accuracies are only logged."""
    return torch.stack([v for name, v in values.items() if not name.endswith("_acc")]).sum()


class Trainer:
    """Runs the stages, writes ``log.jsonl`` and ``checkpoint.pt`` to ``out``, resumes from them.

    A model's own trainer builds ``model``, ``processor`` and ``heads`` and says what is minimised;
    one that is shown something else than scenes says also what, and how it is saved.
    ``first`` is the first training scene; models that learn from each other share none.
    """

    stages: tuple[Stage, ...]
    first = 0

    def __init__(self, model: Any, processor: Any, heads: nn.Module, out: Path) -> None:
        self.model, self.processor, self.heads, self.out = model, processor, heads, out
        self.device = next(heads.parameters()).device
        self.stage, self.step, self.optimizer_state = 0, 0, None
        self.save_every = 0.0  # seconds
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load(torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True))

    def losses(self, stage: Stage, batch: Any) -> dict[str, Tensor]:
        """What is minimised, and under names that end in ``_acc`` what is only logged."""
        raise NotImplementedError

    def show(self, stage: Stage, n: int) -> Show:
        """What writes batches of ``n``, given the number of the first image and their size."""
        return Writer(self.processor.tokenizer, stage.levels, n)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

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
        """Runs what is left of the stages and saves model and processor to ``out/model``."""
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage])
            self.stage, self.step, self.optimizer_state = self.stage + 1, 0, None
        self.save(self.out / "model")

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
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        show = self.show(stage, stage.part or stage.batch)
        saved = time.monotonic()
        sums: dict[str, list[float]] = defaultdict(list)
        while self.step < stage.steps:
            began = time.monotonic()
            self._learn(stage, optimizer, show, sums)
            self.step += 1
            sums["images_per_s"].append(stage.batch / (time.monotonic() - began))
            if self.step % 25 == 0:
                self._log(stage, sums)
                sums.clear()
            if time.monotonic() - saved > self.save_every or self.step == stage.steps:
                self._save(optimizer)
                saved = time.monotonic()

    def _learn(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        show: Show,
        sums: dict[str, list[float]],
    ) -> None:
        """One step of the optimizer."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(self.step, stage.steps, stage.warmup)
        size = stage.sizes[self.step % len(stage.sizes)]
        first = self.first + 10_000_000 * self.stage + self.step * stage.batch
        part = stage.part or stage.batch
        optimizer.zero_grad()
        for start in range(first, first + stage.batch, part):
            values = self.losses(stage, show(start, size).to(self.device))
            (sum_losses(values) * (part / stage.batch)).backward()
            for name, value in values.items():
                sums[name].append(float(value.detach()))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def _log(self, stage: Stage, sums: dict[str, list[float]]) -> None:
        row = {"stage": stage.name, "step": self.step}
        row |= {name: round(_mean(v), 4) for name, v in sums.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]  # a batch may lack what an accuracy is about
    return sum(known) / max(1, len(known))


def run_command(make: Callable[[Path, torch.device], Trainer], what: str) -> None:
    """Trains, or goes on training, as the command line says."""
    parser = argparse.ArgumentParser(description=f"Trains the shipped {what}.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    trainer = make(args.out, torch.device(args.device))
    trainer.save_every = 60 * args.checkpoint_minutes
    trainer.run()
