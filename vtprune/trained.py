"""Files of trained weights: where a name leads to, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vtprune.errors import ConfigError

SHIPPED = Path(__file__).parent / "eval" / "models"  # a folder per model, its weights in it


@dataclass(frozen=True)
class Trained:
    """One kind of trained weights.

    Attributes:
        what: their name, and the option that takes them.
        file: what they are called in a model's folder.
        train: says how to get some.
    """

    what: str
    file: str
    train: str

    def find(self, name: str) -> Path:
        """Returns the file that ``name`` means: it, or that of a folder or a shipped model.

        Raises:
            ConfigError: there is none.
        """
        path = Path(os.path.expanduser(name))
        for file in (path, path / self.file, SHIPPED / name / self.file):
            if file.is_file():
                return file
        shipped = (repr(file.parent.name) for file in SHIPPED.glob(f"*/{self.file}"))
        raise ConfigError(
            f"{self.what}={name!r} is neither a file, nor a folder with a {self.file}, nor a model "
            f"whose {self.what} come with this package ({', '.join(shipped) or 'none'}). "
            f"{self.train}"
        )

    def beside(self, folder: str) -> str | None:
        """Returns the file in a model's folder, None where there is none."""
        here = Path(folder, self.file)
        return str(here) if folder and here.is_file() else None


def stamp(path: Path) -> tuple[int, int]:
    """Returns what changes with the file, so that it is read again."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors to a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial)
    partial.replace(path)
