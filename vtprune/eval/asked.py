"""What a sweep is asked to measure: the options of the command line that go together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike

from vtprune.errors import ConfigError
from vtprune.eval import samples
from vtprune.eval.budgets import (
    VIT_STRATEGIES,
    Point,
    parse_keep,
    point_of,
    points,
    spell,
    split,
)
from vtprune.eval.lmms_benchmarks import find_benchmarks
from vtprune.eval.samples import LMMS, Task, find_tasks
from vtprune.eval.samples_vit import VIT_TASKS
from vtprune.eval.sweep import Sweep
from vtprune.eval.sweep_lmms import LmmsSweep
from vtprune.eval.sweep_vit import SWEEPS
from vtprune.registry import build
from vtprune.setting import is_setting, read_setting


@dataclass(frozen=True)
class Asked:
    """What is measured, the options as they were completed, and the class that measures it."""

    points: list[Point]
    tasks: Sequence[Task]
    options: dict[str, str]
    sweep: Callable[..., Sweep]


def asked(vit: str | None, options: dict[str, str], given: Collection[str]) -> Asked:
    """Returns the points and tasks of a sweep.

    Args:
        vit: which shipped ViT is measured, None = a vision-language model.
        options: ``strategy``, ``keep``, ``reduce``, ``task`` and ``hint`` as text, and
            ``include_path``, if there is such an option.
        given: those that the user gave; the others may be completed.

    Raises:
        ConfigError: an option that makes no sense for the model, or one that is not understood.
    """
    options = dict(options)
    names = split(options["strategy"])
    if names and all(map(is_setting, names)):
        _refuse_beside(names[0], given)
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
    tasks, folders = split(options["task"]), split(options.get("include_path", ""))
    _refuse_mixed(vit, tasks, folders, options["hint"])
    if any(name.startswith(LMMS) for name in tasks):
        benchmarks = find_benchmarks(tasks, folders)
        return Asked(found, benchmarks, options, partial(LmmsSweep, benchmarks=benchmarks))
    if vit is None:
        return Asked(found, find_tasks(tasks), options, Sweep)
    return Asked(found, find_tasks(tasks, VIT_TASKS[vit]), options, SWEEPS[vit])


def _refuse_mixed(vit: str | None, tasks: Sequence[str], folders: Sequence[str], hint: str) -> None:
    """Raises ConfigError for what makes no sense with tasks of lmms-eval, or only with them."""
    theirs = [name for name in tasks if name.startswith(LMMS)]
    if folders and not theirs:
        raise ConfigError(
            f"--include-path {','.join(folders)} has tasks of lmms-eval. Name some of them, as in "
            f"--task {LMMS}NAME, or leave it out."
        )
    if not theirs:
        return
    if vit is not None:
        raise ConfigError(f"--task {theirs[0]}: {vit} answers no questions. Choose another model.")
    if own := [name for name in tasks if name not in theirs]:
        raise ConfigError(
            f"--task {','.join(tasks)}: {own[0]} is not asked by lmms-eval. Sweep it by itself; "
            f"the default task is there too, as {LMMS}vtprune_scenes."
        )
    if hint:
        raise ConfigError(f"--hint {hint!r}: {theirs[0]} has words of its own. Leave it out.")


def asked_one(strategy: str, keep: str, given: Collection[str]) -> Point:
    """Returns the point of a command that takes one strategy and one budget.

    Args:
        strategy: a name, with options or without, or the file of a setting.
        keep: the budget of a strategy that is given by name.
        given: the options that the user gave.

    Raises:
        ConfigError: a budget beside a file, or one that is not understood; an unknown strategy.
    """
    if is_setting(strategy):
        _refuse_beside(strategy, given)
        return point_of(read_setting(strategy))
    build(strategy)
    return Point(strategy, spell(parse_keep(keep)))


def _refuse_beside(file: str | PathLike[str], given: Collection[str]) -> None:
    if twice := [f"--{name}" for name in ("keep", "reduce") if name in given]:
        raise ConfigError(f"{', '.join(twice)}: {file} has its own budget. Leave it out.")
