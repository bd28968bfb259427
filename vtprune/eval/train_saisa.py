"""Trains the projectors of SAISA: with them a model is to answer as it does by itself.

The model learns nothing. Scenes are read twice, whole and with the block in all layers, with up to
16 questions each in one prompt. What is minimised says, at each word of questions and answers, how
far the next word's probabilities are from those of the whole model (KL), and its hidden states in
each layer, as a share of theirs; and how far the visual tokens that are made, normed, are from
those that the whole model has there. As the authors, it first trains one projector that all layers
share, here from the model's own where that has its sizes, then a copy of it for each layer. Theirs
learn the next word itself, and a language model with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.computing import Computing
from vtprune.engine.decoding import Decoding
from vtprune.engine.plan import find_adapter
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import scenes, shipped
from vtprune.eval.train_loop import MIXED, schedule
from vtprune.eval.train_packing import Packed, Packer
from vtprune.projectors import Projector, Projectors, save
from vtprune.registry import build
from vtprune.types import Patches, RowRule
from vtprune.vlm_adapters._base import VLMAdapter

FIRST = 950_000_000  # training scene; far behind those that the shipped models have seen
EVERY = 50  # steps between checkpoints
SHARED = 0.1  # of the steps, with one projector for all layers


@dataclass(frozen=True)
class Course:
    """How projectors are trained: ``steps`` of ``batch`` scenes each, at a peak rate ``lr``."""

    steps: int
    batch: int = 8
    lr: float = 2e-3
    seed: int = 0

    @property
    def shared(self) -> int:
        """Steps with one projector for all layers."""
        return max(1, round(SHARED * self.steps))


class Distillation:
    """A model, and the same with the block in all layers, on packed prompts."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.adapter = model, find_adapter(model)
        self.need = Patches(self.adapter.facts.feature_block)
        self.pack = Packer(self.adapter, processor, self.need)
        model.requires_grad_(False)

    def states(self, packed: Packed) -> Sequence[Tensor]:
        """Returns what enters each layer, and last what leaves the model, ``[B, S, D]`` each."""
        return self.adapter.language_model(
            inputs_embeds=packed.embeds,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    @contextmanager
    def with_block(self, projectors: Projectors, packed: Packed) -> Iterator[None]:
        """Puts the block into all layers."""
        stages = build("saisa", projectors=projectors).plan(self.adapter.facts)
        rules = {s.layer or 0: s.rule for s in stages if isinstance(s.rule, RowRule)}
        valid = torch.ones_like(packed.visual)
        decoding = Decoding(valid, packed.visual, packed.visual, [])
        decoding.rows[self.need] = packed.features
        computing = Computing(self.adapter.decoder, rules, lambda: decoding)
        implementation = self.adapter.language_model.config._attn_implementation or "eager"
        with ExitStack() as undo:
            tap.install(implementation)
            undo.callback(tap.uninstall, implementation)
            computing.install(undo)
            undo.enter_context(tap.changing(computing))
            yield

    def losses(self, projectors: Projectors, packed: Packed) -> dict[str, Tensor]:
        """Returns what is minimised."""
        with torch.no_grad():
            whole = self.states(packed)
        with self.with_block(projectors, packed):
            made = self.states(packed)
        told, head = packed.told, self.model.get_output_embeddings()
        aims, found = (head(x[-1][told]).float().log_softmax(-1) for x in (whole, made))
        apart = [_distance(b[told], a[told]) for a, b in zip(whole[1:], made[1:], strict=True)]
        return {
            "answer": F.kl_div(found, aims, reduction="batchmean", log_target=True),
            "words": torch.stack(apart).mean(),
            "tokens": 0.3 * self._tokens(projectors, packed, whole),
        }

    def _tokens(self, projectors: Projectors, packed: Packed, whole: Sequence[Tensor]) -> Tensor:
        """Returns how far made tokens are from those that enter each layer, mean over layers."""
        rows = packed.visual & ~packed.features[..., 0].isnan()
        features, width, apart = packed.features[rows], packed.embeds.shape[2], []
        for number, layer in enumerate(self.adapter.decoder):
            norm: Any = getattr(layer, "input_layernorm", nn.Identity())
            made = projectors.make(features, number, width)
            apart.append(_distance(norm(made), norm(whole[number][rows])))
        return torch.stack(apart).mean()

    def check(self, scene: scenes.Scene) -> None:
        """Raises UnsupportedError where packed prompts are read otherwise than single ones."""
        question = scene.questions[0].text
        asked = self.pack.ask([question], [scene.image])
        with torch.no_grad():
            inputs = {name: value.to(self.model.device) for name, value in asked.items()}
            wanted = self.model(**inputs).logits[0, -1].float()
            packed = self.pack([replace(scene, questions=scene.questions[:1])])
            logits = self.model.get_output_embeddings()(self.states(packed)[-1][0]).float()
        at = inputs["input_ids"].shape[1] - 1
        if not torch.allclose(logits[at], wanted, atol=0.05 * float(wanted.std())):
            raise UnsupportedError(
                f"{self.adapter.facts.family} does not read questions packed into one prompt as it "
                "reads each alone, so saisa cannot be trained on it. Train on a LLaVA."
            )


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns the squared distance of ``[M, D]``, as a share of what it is from 0."""
    return (found.float() - wanted.float()).square().sum() / wanted.float().square().sum()


def begin(adapter: VLMAdapter, features: int, course: Course) -> Projectors:
    """Returns one projector for all layers, the model's own where it has the sizes."""
    width, depth = adapter.language_model.config.hidden_size, adapter.facts.decoder_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.seed)
        projector = Projector(features, width, width)
    own = getattr(adapter.base, "multi_modal_projector", None)
    given = {} if own is None else own.state_dict()
    mine = projector.state_dict()
    if {n: x.shape for n, x in given.items()} == {n: x.shape for n, x in mine.items()}:
        projector.load_state_dict({name: value.float() for name, value in given.items()})
    return Projectors([projector] * depth).to(adapter.model.device)


def separate(projectors: Projectors) -> Projectors:
    """Returns a copy of its projector for each layer."""
    return Projectors([copy.deepcopy(projectors.of(i)) for i in range(projectors.depth)])


class Training:
    """A course and how far it went; ``path`` holds what it goes on from.

    Raises:
        ConfigError: ``path`` holds another course or model.
    """

    def __init__(self, pair: Distillation, course: Course, path: Path, of: str) -> None:
        self.pair, self.course, self.path = pair, course, path
        self.of = f"{of} {course}"
        self.losses: list[dict[str, float]] = []  # of each step
        features = pair.pack([scenes.make_scene(FIRST, "train")]).features.shape[2]
        self.projectors = begin(pair.adapter, features, course)
        self.optimizer = self._optimizer()
        if path.exists():
            self._resume()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.projectors.parameters(), weight_decay=0.0, betas=(0.9, 0.98))

    def _part(self) -> None:
        """Goes on with a projector per layer."""
        self.projectors = separate(self.projectors)
        self.optimizer = self._optimizer()

    @property
    def step(self) -> int:
        return len(self.losses)

    def run(self, advance: Callable[[int], None] = lambda n: None) -> Projectors:
        """Trains to the end; ``advance`` is told the scenes that were learnt from."""
        advance(self.step * self.course.batch)
        while self.step < self.course.steps:
            if self.step == self.course.shared:
                self._part()
            self.losses.append(self._learn())
            if self.step % EVERY == 0 or self.step == self.course.steps:
                self._save()
            advance(self.course.batch)
        return self.projectors.requires_grad_(False).eval()

    def _learn(self) -> dict[str, float]:
        course, step = self.course, self.step
        first, steps = (0, course.shared) if step < course.shared else (course.shared, course.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = course.lr * schedule(step - first, steps - first, 20)
        numbers = range(FIRST + step * course.batch, FIRST + (step + 1) * course.batch)
        packed = self.pair.pack(
            [scenes.make_scene(i, "train", MIXED[i % len(MIXED)]) for i in numbers]
        )
        with torch.enable_grad():
            self.optimizer.zero_grad()
            losses = self.pair.losses(self.projectors, packed)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(self.projectors.parameters(), 1.0)
            self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _save(self) -> None:
        state = {
            "of": self.of,
            "losses": self.losses,
            "projectors": self.projectors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_name(f"{self.path.name}.partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["of"] != self.of:
            raise ConfigError(
                f"{self.path} holds the training of another model or with other options. Move it "
                "away, or choose another --out."
            )
        self.losses = state["losses"]
        if self.step > self.course.shared:
            self._part()
        self.projectors.load_state_dict(state["projectors"])
        self.optimizer.load_state_dict(state["optimizer"])


def told(losses: Mapping[str, float]) -> list[str]:
    """Returns what ``train_saisa`` returns in lines."""
    return ["loss    on the last scenes", *(f"{what:<7} {x:.3g}" for what, x in losses.items())]


def train_saisa(
    name: str,
    out: Path,
    *,
    samples: int,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """Trains projectors for a model on ``samples`` scenes and writes them to ``out``.

    Beside it, as ``out`` with ``.training`` behind, is what an interrupted call goes on from.

    Args:
        name: of the model; it, ``device`` and ``dtype`` are as ``shipped.load`` takes them.
        advance: told the scenes that were learnt from, of an earlier call too.

    Returns:
        What is minimised, on the last tenth of the scenes.

    Raises:
        ConfigError: no such model, or no folder to write to.
        UnsupportedError: the model cannot be trained so.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}. Make it.")
    model, processor = shipped.load(name, device, dtype)
    of, pair = shipped.fingerprint(model, processor), Distillation(model, processor)
    pair.check(scenes.make_scene(FIRST, "train"))
    course = Course(max(2, samples // Course.batch), seed=seed)
    path = out.with_name(f"{out.name}.training")
    training = Training(pair, course, path, of)
    save(training.run(advance), out)
    last = training.losses[-max(1, course.steps // 10) :]
    return {what: sum(step[what] for step in last) / len(last) for what in last[0]}
