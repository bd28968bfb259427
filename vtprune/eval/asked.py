"""What a sweep is asked to measure: the options of the command line that go together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vtprune.errors import ConfigError
from vtprune.eval import samples
from vtprune.eval.budgets import VIT_STRATEGIES, Point, points, split
from vtprune.eval.samples import Task, find_tasks
from vtprune.eval.samples_vit import VIT_TASKS


@dataclass(frozen=True)
class Asked:
    """What is measured, and the options as they were completed."""

    points: list[Point]
    tasks: list[Task]
    options: dict[str, str]


def asked(vit: str | None, options: dict[str, str], given: Collection[str]) -> Asked:
    """Returns the points and tasks of a sweep.

    Args:
        vit: which shipped ViT is measured, None = a vision-language model.
        options: ``strategy``, ``keep``, ``reduce``, ``task`` and ``hint`` as text.
        given: those that the user gave; the others may be completed.

    Raises:
        ConfigError: an option that makes no sense for the model, or one that is not understood.
    """
    options = dict(options)
    if vit is None:
        if options["reduce"]:
            raise ConfigError(
                f"--reduce {options['reduce']}: it says what leaves per block of a ViT. Give "
                "--keep for a vision-language model, or --model mini-vit."
            )
        options["task"] = options["task"] if "task" in given else samples.DEFAULT
    else:
        if options["hint"]:
            raise ConfigError(f"--hint {options['hint']!r}: {vit} is asked nothing. Leave it out.")
        if "task" not in given:
            options["task"] = ",".join(VIT_TASKS[vit])
        if "strategy" not in given:
            options["strategy"] = ",".join(VIT_STRATEGIES)
        if options["reduce"] and "keep" not in given:
            options["keep"] = ""
    found = points(
        split(options["strategy"]),
        split(options["keep"]),
        split(options["reduce"]),
        blind=vit is None,
    )
    known = samples.TASKS if vit is None else VIT_TASKS[vit]
    return Asked(found, find_tasks(split(options["task"]), known), options)
