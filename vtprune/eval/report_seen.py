"""Runs the model of a sweep again, to see which patches its strategies kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vtprune.engine.plan import wrap
from vtprune.errors import ConfigError
from vtprune.eval import shipped
from vtprune.eval.budgets import Point, parse_budget
from vtprune.eval.regions import moments_of, regions_of
from vtprune.eval.results import Settings
from vtprune.eval.rows import Answer
from vtprune.eval.samples import TASKS, Asker, Sample, Video, find_tasks
from vtprune.eval.samples_vit import VIT_TASKS
from vtprune.eval.shipped_vit import Inputs
from vtprune.eval.show import kept_mask, what_is_seen
from vtprune.eval.show_vit import as_seen, kept_patches
from vtprune.eval.sweep import seeded

Picture = NDArray[np.float32]  # [H, W, 3] in 0 to 1
Regions = NDArray[np.int64]  # [rows, cols] as of regions_of


class Seer:
    """Looks at samples of a sweep once more, with its model and settings."""

    def __init__(self, settings: Settings, model: str = "") -> None:
        """Loads the model, from where ``model`` says if it says something.

        Raises:
            ConfigError: it would have to be downloaded, cannot be loaded, or is another one.
        """
        name = model or settings.model
        if not model and shipped.directory(name) is None:
            raise ConfigError(
                f"{name} is neither a shipped model nor a directory. Say --model {name} to have it "
                "loaded from the hub or its cache, or give a directory."
            )
        device, _, dtype = settings.device.partition(" ")
        usable = device.partition(":")[0] != "cuda" or torch.cuda.is_available()
        self.settings, self.device = settings, device if usable else "cpu"
        self.model, self.processor = shipped.load(name, self.device, dtype.removeprefix("torch."))
        if shipped.fingerprint(self.model, self.processor) != settings.fingerprint:
            raise ConfigError(
                f"{name} is not the model that was measured: its weights, configuration or "
                "processor are others. Give the right one as --model."
            )
        vit = isinstance(self.processor, Inputs)
        self._known = VIT_TASKS[self.processor.name] if vit else TASKS
        self._look = self._look_at_picture if vit else self._look_at_prompt

    def sample(self, row: Answer) -> Sample:
        """Returns the sample that a row answers.

        Raises:
            ConfigError: its task is not one of this package's, or has another sample there.
        """
        (task,) = find_tasks([row.task], self._known)
        (found,) = task.load(row.sample, row.sample + 1)
        if (found.question, found.expected) != (row.question, row.expected):
            raise ConfigError(
                f"Sample {row.sample} of {row.task} is not the one that was asked: "
                f"{row.question!r} there, {found.question!r} now."
            )
        return found

    def look(self, sample: Sample, point: Point) -> tuple[Picture, Regions]:
        """Returns what the tower gets, and the regions of what ``point`` kept of it.

        Raises:
            UnsupportedError: the visual tokens of this model form no single grid.
        """
        size = self.settings.batch_size
        strategy = seeded(point.strategy, self.settings.seed, sample.index // size * size)
        with torch.inference_mode():
            return self._look(sample, strategy, parse_budget(point.budget))

    def _look_at_prompt(
        self, sample: Sample, strategy: Any, budget: dict[str, Any]
    ) -> tuple[Picture, Regions]:
        prompt = Asker(self.processor, self.settings.hint)([sample.question], [sample.seen])
        inputs = {name: value.to(self.model.device) for name, value in prompt.items()}
        with wrap(self.model, strategy, processor=self.processor, **budget) as handle:
            self.model(**inputs)
            lit = kept_mask(handle, inputs["input_ids"])
            regions = regions_of(handle.selections[0], lit)
        if isinstance(sample.seen, Video):
            return moments_of(sample.seen.frames, regions)
        seen = what_is_seen(inputs["pixel_values"], self.processor.image_processor, sample.image)
        return seen, regions

    def _look_at_picture(
        self, sample: Sample, strategy: Any, budget: dict[str, Any]
    ) -> tuple[Picture, Regions]:
        first = next(self.model.parameters())
        pixels = self.processor.images([sample.image]).to(first.device, first.dtype)
        with wrap(self.model, strategy, **budget) as handle:
            (self.model.encode_image if self.processor.reads else self.model)(pixels)
            (selection,) = handle.selections
        return as_seen(pixels), regions_of(selection, kept_patches(selection))
