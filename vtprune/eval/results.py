"""The folder of a sweep: settings, answers and times, written as they come and resumed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point
from vtprune.eval.ranks import Ranks
from vtprune.eval.rows import Answer, JsonLines, Timing, write_whole

COMMANDS = "commands.json"
COLUMNS = ", ".join(field.name for field in fields(Answer))


@dataclass(frozen=True)
class Settings:
    """What must be equal for two runs to share a folder, ``columns`` of the answers too."""

    model: str
    fingerprint: str
    task: str
    hint: str
    limit: int
    batch_size: int
    seed: int
    max_new_tokens: int
    device: str
    versions: str
    columns: str = COLUMNS


class Folder:
    """``settings.json``, ``results.jsonl`` and ``timings.jsonl`` of one run.

    One run at a time, of one process or several ranks: each holds a lock that ends with it, however
    that ends, and what ranks left behind is put together when the next run opens the folder.
    """

    def __init__(self, path: Path, settings: Settings, ranks: Ranks | None = None) -> None:
        """Opens or begins a run; the first of several ``ranks`` before the others.

        Raises:
            ConfigError: the folder cannot be used, or belongs to a run with other settings.
        """
        self.path, self.settings = path, settings
        self.ranks = Ranks.alone() if ranks is None else ranks
        check_folder(path)
        name = ".lock" if self.ranks.first else f".lock.rank-{self.ranks.rank}"
        self._lock = FileLock(path / name, blocking=False)
        try:
            if self.ranks.first:
                self._open(settings)
            self.ranks.meet("opened by the first")
            if not self.ranks.first:
                self._open(settings)
            self.ranks.meet("read by all")  # until then nobody writes
        except Timeout as error:
            self.close()
            raise ConfigError(
                f"Another sweep is writing to {path}. Wait for it, or choose another --out."
            ) from error
        except OSError as error:
            self.close()
            raise ConfigError(
                f"--out {path} cannot be used: {error.strerror}. Give a folder that can be written."
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, settings: Settings) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if self.ranks.first:
            for left in self.path.glob(".lock.rank-*"):  # ranks that have outlived their first one
                with FileLock(left, blocking=False):
                    pass
        self._check(settings)
        self.answers = JsonLines(self.path / "results.jsonl", Answer, self.ranks.rank)
        self.timings = JsonLines(self.path / "timings.jsonl", Timing, self.ranks.rank)
        self.gather()

    def gather(self, order: Callable[[Answer | Timing], Any] | None = None) -> None:
        """Puts the rows of all ranks together, in order; does nothing in others than the first."""
        if self.ranks.first:
            self.answers.gather(order)
            self.timings.gather(order)

    def remember(self, command: str) -> None:
        """Adds the command line of this run to ``commands.json``; one that is there stays once."""
        if self.ranks.first:
            lines = list(dict.fromkeys([*read_commands(self.path), command]))
            write_whole(self.path / COMMANDS, json.dumps(lines, indent=2) + "\n")

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.release()

    @property
    def damage(self) -> list[str]:
        """What was found damaged and set aside."""
        return [*self.answers.damage, *self.timings.damage]

    def done(self) -> dict[tuple[str, Point], set[int]]:
        """Returns the samples already answered, by task and point."""
        found: dict[tuple[str, Point], set[int]] = defaultdict(set)
        for row in self.answers.rows:
            found[row.task, row.point].add(row.sample)
        return found

    def timed(self) -> set[tuple[str, Point, int]]:
        """Returns the batches already timed: task, point and first sample."""
        return {row.key for row in self.timings.rows}

    def _check(self, settings: Settings) -> None:
        file = self.path / "settings.json"
        wanted = asdict(settings)
        if not file.exists():
            if not self.ranks.first:
                raise ConfigError(
                    f"Rank {self.ranks.rank} does not find what the first rank wrote to "
                    f"{self.path}. Give an --out that the machines of all ranks share."
                )
            for left in (*self.path.glob("results.*jsonl"), *self.path.glob("timings.*jsonl")):
                raise ConfigError(
                    f"{self.path} holds {left.name} but no settings.json, so it cannot be told "
                    "what was measured. Choose another --out."
                )
            write_whole(file, json.dumps(wanted, indent=2) + "\n")
            return
        found = _read_settings(file)
        if found.keys() != wanted.keys() or found["columns"] != wanted["columns"]:
            raise ConfigError(
                f"{self.path} was written by another version of vtprune, whose answers do not have "
                f"what this one's have ({COLUMNS}). Choose another --out."
            )
        names = [name for name in wanted if found[name] != wanted[name]]
        if names:
            listed = "; ".join(f"{n}: {found[n]!r} there, {wanted[n]!r} now" for n in names)
            raise ConfigError(
                f"{self.path} holds another run ({listed}). Repeat its settings to resume it, or "
                "choose another --out."
            )


def read_commands(path: Path) -> list[str]:
    """Returns the command lines that a folder remembers.

    Raises:
        ConfigError: its file is damaged.
    """
    file = path / COMMANDS
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise ConfigError(f"{file} is damaged. Take it away; the next run begins a new one.")
    return found


def check_folder(path: Path) -> None:
    """Raises ConfigError when ``path`` is no folder that can be written; makes nothing."""
    try:
        found = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}. Give another folder.") from error
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        problem = "cannot be written" if found.is_dir() else "is a file"
        raise ConfigError(f"--out {path}: {found} {problem}. Give a folder that can be written.")


def _read_settings(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged; choose another --out.") from error
