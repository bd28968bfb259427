"""The folder of a sweep: settings, answers and times, written as they come and resumed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock, Timeout

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point
from vtprune.eval.rows import Answer, JsonLines, Timing

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

    One process at a time: the lock ends with the process that holds it, however that ends.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        """Opens or begins a run.

        Raises:
            ConfigError: the folder cannot be used, or belongs to a run with other settings.
        """
        self.path, self.settings = path, settings
        check_folder(path)
        self._lock = FileLock(path / ".lock", blocking=False)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._open(settings)
        except Timeout as error:
            raise ConfigError(
                f"Another sweep is writing to {path}. Wait for it, or choose another --out."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"--out {path} cannot be used: {error.strerror}. Give a folder that can be written."
            ) from error

    def _open(self, settings: Settings) -> None:
        try:
            self._check(settings)
            self.answers = JsonLines(self.path / "results.jsonl", Answer)
            self.timings = JsonLines(self.path / "timings.jsonl", Timing)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.release()

    @property
    def damage(self) -> list[str]:
        """What was found damaged and set aside."""
        return [note for note in (self.answers.damage, self.timings.damage) if note]

    def done(self) -> dict[tuple[str, Point], set[int]]:
        """Returns the samples already answered, by task and point."""
        found: dict[tuple[str, Point], set[int]] = defaultdict(set)
        for row in self.answers.rows:
            found[row.task, row.point].add(row.sample)
        return found

    def timed(self) -> set[tuple[str, Point, int]]:
        """Returns the batches already timed: task, point and first sample."""
        return {(row.task, row.point, row.first) for row in self.timings.rows}

    def _check(self, settings: Settings) -> None:
        file = self.path / "settings.json"
        wanted = asdict(settings)
        if not file.exists():
            for name in ("results.jsonl", "timings.jsonl"):
                if (self.path / name).exists():
                    raise ConfigError(
                        f"{self.path} holds {name} but no settings.json, so it cannot be told "
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


def check_folder(path: Path) -> None:
    """Raises ConfigError when ``path`` is no folder that can be written; makes nothing."""
    try:
        found = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}. Give another folder.") from error
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        problem = "cannot be written" if found.is_dir() else "is a file"
        raise ConfigError(f"--out {path}: {found} {problem}. Give a folder that can be written.")


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` so that an interruption leaves the old file or the new one, never a half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _read_settings(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged; choose another --out.") from error
