"""Trains the gates of DyVTE: a model answers, and each gate learns where the image was needed.

The language model learns nothing. Per sample, and for each layer before which the image may leave,
the model's own answer is read once more without it from there on. It may leave where each token of
the answer stays the likeliest and the loss stays below 1.03 of what it was, and 0.01 nats. Of the
authors, who take the reference answer, is the factor alone; a model that is sure of its answer has
a loss so near 0 that any factor of it is noise. Gates are fitted to three quarters of the samples;
their margins on the others say which threshold gives which mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtprune.engine.plan import find_adapter, wrap
from vtprune.errors import ConfigError
from vtprune.eval import scenes, shipped
from vtprune.eval.samples import MAX_NEW_TOKENS, Asker
from vtprune.eval.train_loop import schedule
from vtprune.gates import Form, Gates, make, save
from vtprune.types import Budget, Facts, Positions, Scope, Signals, Site, Stage, Strategy, TextState

Inputs = Mapping[str, Tensor]
FIRST = 900_000_000  # training scene; far behind those that the shipped models have seen
EVERY = 16  # samples between checkpoints
FACTOR, NATS = 1.03, 0.01  # what the loss may grow by


@dataclass(frozen=True)
class _Inside(Strategy):
    kind: ClassVar[Literal["exit"]] = "exit"
    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"


@dataclass(frozen=True)
class Reading(_Inside):
    """Notes what gates read at each layer; all tokens stay."""

    seen: list[Signals] = field(default_factory=list, compare=False)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        last = facts.decoder_layers - 1
        needs = tuple(TextState(layer) for layer in range(1, last + 1))
        return (Stage(Site.DECODER, needs, last),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        self.seen.append(signals)
        return [signals.n] * len(signals.tokens)

    def states(self) -> Tensor:
        """Returns what gates read in the first call, ``[B, L, W]`` on the CPU; of layer 0 zeros."""
        read = self.seen[0].stack(TextState).cpu()
        return torch.cat([torch.zeros_like(read[:1]), read]).transpose(0, 1)


@dataclass(frozen=True)
class Leaving(_Inside):
    """All tokens leave before layer ``at``."""

    at: int = 1

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.DECODER, (), self.at),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        return [0] * len(signals.tokens)


@dataclass(frozen=True)
class Labelled:
    """``states`` ``[S, L, W]`` that enter each layer, and ``labels`` ``[S, L]``, 1 = may leave.

    Of layer 0, before which nothing leaves, they are 0.
    """

    states: Tensor
    labels: Tensor

    def part(self, rows: slice) -> Labelled:
        """Returns some of the samples."""
        return Labelled(self.states[rows], self.labels[rows])


@torch.no_grad()
def label(model: Any, inputs: Inputs, max_new_tokens: int = MAX_NEW_TOKENS) -> Labelled:
    """Returns states and labels of one sample, ``[1, L, W]`` and ``[1, L]``; waits for the device.

    Args:
        inputs: one prompt with its pixels, without padding.
    """
    adapter = find_adapter(model)
    never = [modality.placeholder for modality in adapter.modalities]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    reading = Reading()
    with wrap(model, reading, keep=1.0):
        ids = model.generate(**inputs, **options, suppress_tokens=never)
    first, depth = adapter.facts.first_stage, adapter.facts.decoder_layers
    told = _with_answer(inputs, ids)
    n = ids.shape[1] - inputs["input_ids"].shape[1]
    likeliest, loss = _read(model, told, n)
    labels = torch.zeros(depth, dtype=torch.int64)
    for layer in range(first, depth):
        with wrap(model, Leaving(at=layer), keep=1.0):
            without, more = _read(model, told, n)
        same = (without == likeliest).float().mean() > 0.99
        labels[layer] = int(bool(same) and more < FACTOR * loss + NATS)
    return Labelled(reading.states(), labels[None])


def _with_answer(inputs: Inputs, ids: Tensor) -> dict[str, Tensor]:
    """Returns the inputs with the answer behind the prompt: ``ids`` ``[1, L + n]``."""
    prompt = inputs["input_ids"]
    told = {**inputs, "input_ids": ids}
    for name, value in inputs.items():
        if name != "input_ids" and value.shape == prompt.shape:  # masks and types of tokens
            behind = value.new_full((1, ids.shape[1] - prompt.shape[1]), name == "attention_mask")
            told[name] = torch.cat([value, behind], dim=1)
    return told


def _read(model: Any, told: Inputs, n: int) -> tuple[Tensor, float]:
    """Returns the likeliest token at each of the last ``n`` places, and the loss of those there."""
    logits = model(**told).logits[0, -n - 1 : -1].float()
    loss = F.cross_entropy(logits, told["input_ids"][0, -n:].to(logits.device))
    return logits.argmax(-1), float(loss)


def collect(
    model: Any,
    sample: Callable[[int], Inputs],
    n: int,
    path: Path,
    of: str,
    advance: Callable[[int], None] = lambda n: None,
) -> Labelled:
    """Returns ``n`` labelled samples; those that ``path`` holds already are not labelled again.

    Args:
        sample: returns the inputs of a number from 0 on.
        of: what the samples are of, such as the fingerprint of the model.

    Raises:
        ConfigError: ``path`` holds samples of something else.
    """
    parts = [_resumed(path, of)] if path.exists() else []
    done = sum(len(part.labels) for part in parts)
    advance(min(done, n))
    for number in range(done, n):
        parts.append(label(model, sample(number)))
        advance(1)
        if (number + 1) % EVERY == 0 or number + 1 == n:
            parts = [_joined(parts)]
            partial = path.with_name(f"{path.name}.partial")
            tensors = {"states": parts[0].states, "labels": parts[0].labels}
            save_file(tensors, partial, metadata={"of": of})
            partial.replace(path)
    return _joined(parts).part(slice(n))


def _joined(parts: list[Labelled]) -> Labelled:
    return Labelled(
        torch.cat([part.states for part in parts]), torch.cat([part.labels for part in parts])
    )


def _resumed(path: Path, of: str) -> Labelled:
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("of") != of:
            raise ConfigError(
                f"{path} holds samples of another model or rule. Move it away, or choose another "
                "--out."
            )
        return Labelled(file.get_tensor("states"), file.get_tensor("labels"))


def fit(
    labelled: Labelled,
    form: Form = "shared",
    *,
    hidden: int | None = None,
    epochs: int = 60,
    lr: float = 1e-3,
    seed: int = 0,
) -> Gates:
    """Returns gates trained on three quarters of the samples, with the margins of the others."""
    n, depth, width = labelled.states.shape
    training = labelled.part(slice(n - max(1, n // 4)))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gates = make(form, depth, width, hidden)
        for parameter in gates.parameters():
            torch.nn.init.xavier_uniform_(parameter)
        optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.01)
        batches = [training.part(slice(i, i + 32)) for i in range(0, len(training.labels), 32)]
        steps = epochs * len(batches)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps, steps // 30)
            optimizer.zero_grad()
            _loss(gates, batches[step % len(batches)]).backward()
            optimizer.step()
    gates.requires_grad_(False).eval()
    gates.margins = margins_of(gates, held_out(labelled))
    return gates


def held_out(labelled: Labelled) -> Labelled:
    """Returns the quarter of the samples that gates are not trained on."""
    n = len(labelled.labels)
    return labelled.part(slice(n - max(1, n // 4), n))


def _loss(gates: Gates, batch: Labelled) -> Tensor:
    logits = [gates(batch.states[:, layer], layer) for layer in range(1, gates.depth)]
    return F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), batch.labels[:, 1:].flatten())


@torch.no_grad()
def margins_of(gates: Gates, labelled: Labelled) -> Tensor:
    """Returns what gates make of each sample before each layer, ``[S, L]``."""
    found = torch.full(labelled.labels.shape, -torch.inf)
    for layer in range(1, gates.depth):
        found[:, layer] = gates.margin(labelled.states[:, layer], layer)
    return found


def told(found: Mapping[int, tuple[float, float]]) -> list[str]:
    """Returns what ``train_dyvte`` returns in lines."""
    lines = ["layer  may leave  gate is right (of held-out samples)"]
    return lines + [f"{at:>5}  {may:>9.0%}  {right:>13.0%}" for at, (may, right) in found.items()]


def train_dyvte(
    name: str,
    out: Path,
    *,
    samples: int,
    form: str = "shared",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    advance: Callable[[int], None] = lambda n: None,
) -> dict[int, tuple[float, float]]:
    """Trains gates for a model on ``samples`` scenes and writes them to ``out``.

    Beside it, as ``out`` with ``.samples`` behind, is what an interrupted call goes on from.

    Args:
        name: of the model; it, ``device`` and ``dtype`` are as ``shipped.load`` takes them.

    Returns:
        Per layer, of the held-out samples, what share may leave there, and for what share its
        gate is right.

    Raises:
        ConfigError: no such form or model, or no folder to write to.
    """
    if form not in get_args(Form):
        raise ConfigError(f"form={form!r} is unknown; choose {' or '.join(get_args(Form))}.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")
    model, processor = shipped.load(name, device, dtype)
    ask = Asker(processor)
    of = f"{shipped.fingerprint(model, processor)} {FACTOR} {NATS}"

    def sample(number: int) -> Inputs:
        scene = scenes.make_scene(FIRST + number, "train")
        asked = scenes.pick_question(scene, FIRST + number)
        inputs = ask([asked.text], [scene.image])
        return {key: value.to(model.device) for key, value in inputs.items()}

    labelled = collect(model, sample, samples, out.with_name(f"{out.name}.samples"), of, advance)
    gates = fit(labelled, "per_layer" if form == "per_layer" else "shared", seed=seed)
    save(gates, out)
    labels = held_out(labelled).labels[:, 1:].bool()
    right = ((gates.margins[:, 1:] > 0) == labels).float().mean(0)
    may = labels.float().mean(0)
    return {i + 1: (float(may[i]), float(right[i])) for i in range(len(may))}
