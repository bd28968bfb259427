"""Tasks of lmms-eval by name: its own, those of given folders, and the scenes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval._extras import need
from vtprune.eval.lmms_plugin import NAME, TASKS
from vtprune.eval.ranks import NAMES as RANKS
from vtprune.eval.samples import LMMS, Sample, Task

GENERATED = ("generate_until", "generate_until_multi_round", "generate_until_agentic")


@dataclass(frozen=True)
class Benchmark(Task):
    """A task or a group of lmms-eval, found by ``manager``; ``sizes`` are those of its tasks."""

    manager: Any
    sizes: tuple[int, ...]

    @property
    def known_as(self) -> str:
        """What lmms-eval calls it."""
        return self.name.removeprefix(LMMS)

    def n(self, limit: int) -> int:
        """Returns how many samples are asked, at most ``limit`` per task."""
        return sum(min(limit, size) for size in self.sizes)


def find_benchmarks(names: Sequence[str], include: Sequence[str] = ()) -> list[Benchmark]:
    """Returns the tasks of these names, such as ``lmms:pope``, with their data at hand.

    lmms-eval's own tasks, which take it many seconds to list, are looked through only for what is
    not in the folders.

    Raises:
        ConfigError: no such task or folder, one that cannot be loaded, or one that is not answered
            in words.
        ImportError: lmms-eval is not installed.
    """
    need("lmms_eval", extra="lmms")
    for folder in include:
        if not Path(folder).is_dir():
            raise ConfigError(f"--include-path {folder} is no folder. Give one with task YAMLs.")
    folders = [str(TASKS), *include]
    with secluded():
        local = _manager(folders, False)
        plain = [name.removeprefix(LMMS) for name in names]
        all_local = set(plain) <= set(local.all_tasks)
        every = local if all_local else _manager(folders, True)
    for name in plain:
        if name not in every.all_tasks:
            raise _unknown(name, every.all_tasks)
    return [_load(name, local if name in local.all_tasks else every) for name in plain]


def _manager(folders: Sequence[str], defaults: bool) -> Any:
    tasks = need("lmms_eval.tasks", extra="lmms")
    return tasks.TaskManager(include_path=list(folders), include_defaults=defaults, model_name=NAME)


def _load(name: str, manager: Any) -> Benchmark:
    tasks, utils = (
        need("lmms_eval.tasks", extra="lmms"),
        need("lmms_eval.evaluator_utils", extra="lmms"),
    )
    try:
        with secluded():
            found = tasks.get_task_dict([name], manager, "chat")
    except Exception as error:  # a task runs code of its own, and downloads
        last = getattr(error, "last_attempt", None)
        reason = str((last.exception() if last else None) or error).strip().partition("\n")[0]
        raise ConfigError(
            f"The task {name!r} of lmms-eval cannot be loaded: {reason}. Its data may have to be "
            "downloaded first, or copy its YAML, name local files, and give --include-path."
        ) from error
    leaves = [output.task for output in utils.get_task_list(found)]
    for task in leaves:
        if task.OUTPUT_TYPE not in GENERATED:
            raise ConfigError(
                f"{task.task_name} is of the type {task.OUTPUT_TYPE}, which lmms-eval does not ask "
                f"chat models. Choose one of the type {', '.join(GENERATED)}."
            )
    sizes = tuple(len(task.eval_docs) for task in leaves)
    what = f"{name} of lmms-eval"
    return Benchmark(f"{LMMS}{name}", what, _asked_by_lmms, manager, sizes, videos=True)


def _asked_by_lmms(first: int, end: int) -> list[Sample]:
    raise UnsupportedError("Tasks of lmms-eval put their questions themselves.")


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    return ConfigError(
        f"lmms-eval has no task {name!r}. {hint}'lmms-eval tasks list' names its {len(known)}; "
        "--include-path takes a folder with your own."
    )


@contextmanager
def secluded() -> Iterator[None]:
    """Keeps lmms-eval to itself: its bars and notes, the ranks of a sweep, and how it locks files.

    It makes the locks of the whole process such that one that is held can be had again.
    """
    evaluator = need("lmms_eval.evaluator", extra="lmms")
    logger, locks = need("loguru", extra="lmms").logger, cast(Any, type(FileLock))
    locking = locks.__call__
    logger.disable("lmms_eval")
    ranks = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        os.environ.update(ranks)
        locks.__call__ = locking
        vars(getattr(evaluator, "_enable_reentrant_filelocks", secluded)).pop("_patched", None)
        logger.enable("lmms_eval")
