"""``vtprune train`` for strategies in ViTs: what is trained for which, and on how many pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vtprune.errors import ConfigError
from vtprune.eval import mini_clip, mini_vit, shipped
from vtprune.eval.train_beside import BesideTrainer
from vtprune.eval.train_crossget import CrossGETTrainer
from vtprune.eval.train_dependencyvit import STAGES, DependencyViTTrainer
from vtprune.eval.train_dynamicvit import DynamicViTTrainer
from vtprune.eval.train_loop import Stage
from vtprune.eval.train_sparsifiner import SparsifinerTrainer
from vtprune.strategies.crossget import CROSS
from vtprune.strategies.dependencyvit import MESSENGERS
from vtprune.strategies.dynamicvit import BEFORE, KEEPERS
from vtprune.strategies.sparsifiner import PREDICTORS
from vtprune.trained import write

BATCH = 16
PICTURES = {"sparsifiner": 8000, "dynamicvit": 16000, "dependencyvit": 107200, "crossget": 6400}
OUT = {
    "sparsifiner": PREDICTORS.file,
    "dynamicvit": KEEPERS.file,
    "dependencyvit": "dependencyvit",
    "crossget": CROSS.file,
}
USE = {
    "sparsifiner": "predictors=FILE",
    "dynamicvit": "keep=..., keepers=FILE",
    "dependencyvit": f"keep=..., messengers=FOLDER/{MESSENGERS.file}",
    "crossget": "keep=..., tokens=FILE",
}
MODELS = {"crossget": (mini_vit.NAME, mini_clip.NAME)}  # of the others mini-vit alone


def train_vit(
    strategy: str,
    name: str,
    out: Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Trains what a strategy asks of a ViT on ``samples`` pictures, and writes it to ``out``.

    That is a file, of dependencyvit the folder of a ViT of its own. Beside it, as ``out`` with
    ``.training`` behind, are the log and what an interrupted call goes on from.

    Args:
        name: of the model, as ``shipped.load`` takes it.

    Raises:
        ConfigError: no such model, one that is no classifier of the shipped kind, or no folder to
            write to.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")
    known = MODELS.get(strategy, (mini_vit.NAME,))
    if shipped.vit(name) not in known:
        raise ConfigError(
            f"{name} is no ViT of the shipped kind, on whose pictures {strategy} is trained. Give "
            f"--model {' or '.join(known)}, or the folder of one like it."
        )
    model = shipped.load(name, device)[0]
    torch.manual_seed(seed)
    steps = max(1, (samples or PICTURES[strategy]) // BATCH)
    trainer = _trainer(strategy, model, out.with_name(f"{out.name}.training"), steps)
    trainer.save_every = 60.0
    trainer.run()
    if isinstance(trainer, BesideTrainer):
        write(trainer.heads.state_dict(), out)
    else:
        trainer.save(out)


def _trainer(strategy: str, model: Any, out: Path, steps: int) -> Any:
    if strategy == "sparsifiner":
        stage = Stage("map", steps, 4e-3, (), batch=BATCH, warmup=20)
        return SparsifinerTrainer(model, out, (stage,))
    if strategy == "dynamicvit":
        stage = Stage("keep", steps, 2e-3, (), batch=BATCH, warmup=20)
        return DynamicViTTrainer(model, out, (stage,), BEFORE)
    if strategy == "crossget":
        stage = Stage("guide", steps, 1e-2, (), batch=BATCH, warmup=20)
        return CrossGETTrainer(model, out, (stage,))
    whole = sum(stage.steps for stage in STAGES)
    shares = [max(1, steps * stage.steps // whole) for stage in STAGES]
    stages = tuple(replace(s, steps=n) for s, n in zip(STAGES, shares, strict=True))
    return DependencyViTTrainer(model, out, stages)
