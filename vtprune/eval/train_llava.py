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
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.eval import scenes
from vtprune.eval.mini_llava import PREFIX, WIDTH, build_model, build_processor
from vtprune.eval.train_data import BLOCK, COLOR_NAMES, IGNORE, N_BLOCKS, Batch, Writer


@dataclass(frozen=True)
class Stage:
    """``train`` lists which parts learn: ``tower``, ``llm`` (projector included)."""

    name: str
    steps: int
    lr: float
    train: tuple[str, ...]
    level: scenes.Level = scenes.STANDARD
    batch: int = 32
    tower_lr: float = 1.0  # of ``lr``


STAGES = (
    Stage("dense", 1100, 1.5e-3, ("tower",), scenes.DENSE),
    Stage("sparse", 900, 1e-3, ("tower",)),
    Stage("answer", 2600, 1.2e-3, ("llm",), batch=8),
    Stage("joint", 1550, 5e-4, ("tower", "llm"), batch=8, tower_lr=0.3),
)


class Heads(nn.Module):
    """Readouts used in training only: per patch thing and color, per image presence and count."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.image_norm = nn.LayerNorm(WIDTH)
        self.thing = nn.Linear(WIDTH, 1 + len(scenes.NAMES))
        self.color = nn.Linear(WIDTH, len(COLOR_NAMES))
        self.present = nn.Linear(WIDTH, len(scenes.NAMES) + len(COLOR_NAMES))
        self.count = nn.Linear(WIDTH, scenes.MAX_DIGITS + 1)


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states ``[B, 1 + N, D]`` that yield the features, and those after the last block."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-2], states[-1]


def seeing_loss(heads: Heads, states: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses and accuracies of the readouts on ``states`` ``[B, 1 + N, D]``."""
    cls, patches = heads.image_norm(states[:, 0]), heads.patch_norm(states[:, 1:])
    thing, color = heads.thing(patches).float(), heads.color(patches).float()
    digit = (batch.thing > 0) & (batch.thing <= 10)
    colored = batch.color >= 0
    right = (thing.argmax(-1) == batch.thing)[digit].float().mean()
    weight = torch.ones(thing.shape[-1], device=thing.device)
    weight[0] = 0.3
    losses = {
        "thing": F.cross_entropy(thing.mT, batch.thing, weight=weight, ignore_index=IGNORE),
        "color": F.cross_entropy(color[colored], batch.color[colored]),
        "present": F.binary_cross_entropy_with_logits(heads.present(cls).float(), batch.present),
        "digit_acc": right,
        "color_acc": (color.argmax(-1) == batch.color)[colored].float().mean(),
    }
    if (batch.count != IGNORE).any():
        losses["count"] = F.cross_entropy(heads.count(cls).float(), batch.count) * 0.3
    return losses


def packed_mask(prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Attention mask ``[1, 1, S, S]`` (True = visible) and positions ``[1, S]``.

    Question blocks see the prefix (words and image) and themselves, not each other.
    """
    block = torch.arange(N_BLOCKS, device=device).repeat_interleave(BLOCK)
    owner = torch.cat([torch.full((prefix,), -1, device=device), block])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    seen = causal & ((owner[None] == -1) | (owner[None] == owner[:, None]))
    inside = torch.arange(BLOCK, device=device).repeat(N_BLOCKS)
    positions = torch.cat([torch.arange(prefix, device=device), prefix + inside])
    return seen[None, None], positions[None]


def answering_loss(
    model: LlavaForConditionalGeneration, features: Tensor, batch: Batch, prefix_ids: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy of the answers (and their end), and the share of right first words."""
    embed = model.get_input_embeddings()
    image = model.model.multi_modal_projector(features)
    head = embed(prefix_ids).expand(len(image), -1, -1).to(image.dtype)
    inputs = torch.cat([head, image, embed(batch.ids).to(image.dtype)], dim=1)
    prefix = head.shape[1] + image.shape[1]
    mask, positions = packed_mask(prefix, image.device)
    out = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, prefix:]
    asked = batch.labels != IGNORE
    logits = model.lm_head(out[asked]).float()
    labels = batch.labels[asked]
    right = (logits.argmax(-1) == labels).float()
    return {"answer": F.cross_entropy(logits, labels), "answer_acc": right[::2].mean()}


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
        self.prefix = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(PREFIX))[None]
        self.prefix = self.prefix.to(device)
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
        writer = Writer(self.processor, stage.level, stage.batch)
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
                values |= answering_loss(self.model, states[:, 1:], batch, self.prefix)
        return values

    def _log(self, stage: Stage, sums: dict[str, list[float]]) -> None:
        row = {"stage": stage.name, "step": self.step}
        row |= {name: round(sum(v) / len(v), 4) for name, v in sums.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)


def sum_losses(values: dict[str, Tensor]) -> Tensor:
    """Adds up what is a loss; accuracies are only logged."""
    return torch.stack([v for name, v in values.items() if not name.endswith("_acc")]).sum()


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
