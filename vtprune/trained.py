"""Files of trained weights: where a name leads to, and how they are written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtprune.errors import ConfigError

T = TypeVar("T")
MOST = 8  # that are held in memory
_READ: dict[tuple[str, str, str], tuple[Any, Any]] = {}  # the file as it was, what was read
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

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of the file that ``name`` means, read once and not to be changed.

        Raises:
            ConfigError: there is none, or it is no safetensors file.
        """
        return self.read(name, "cpu", self._tensors)

    def read(self, name: str, device: str, read: Callable[[Path, str], T]) -> T:
        """Returns what ``read`` finds in the file, which it reads once, and again when it changes.

        Under ``torch.compile`` that is what the last call found: a graph looks at no file.
        """
        key = (self.what, name, device)
        if torch.compiler.is_compiling() and key in _READ:
            return _READ[key][1]
        path = self.find(name)
        stat = path.stat()
        now = (path, stat.st_mtime_ns, stat.st_size)
        if key not in _READ or _READ[key][0] != now:
            while len(_READ) >= MOST:
                del _READ[next(iter(_READ))]
            _READ[key] = now, read(path, device)
        return _READ[key][1]

    def _tensors(self, path: Path, device: str) -> dict[str, Tensor]:
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise ConfigError(f"{path} is no safetensors file ({error}). {self.train}") from error


@dataclass(frozen=True)
class Modules(Trained):
    """Trained weights that are a list of modules of one class, each in the file by its number.

    Attributes:
        make: returns one without values, by the names and shapes of its tensors.
    """

    make: Callable[[Mapping[str, Tensor]], nn.Module]

    def load(
        self, source: str | nn.ModuleList | None, device: torch.device | str = "cpu"
    ) -> nn.ModuleList:
        """Returns the modules of a file or a shipped model, read once per device, or given ones.

        Raises:
            ConfigError: none are given, there is no such file, or it holds others.
        """
        if isinstance(source, nn.ModuleList):
            return source
        if source is None:
            raise ConfigError(f"There are no {self.what} for this model. {self.train}")
        return self.read(source, str(torch.device(device)), self._modules)

    def _modules(self, path: Path, device: str) -> nn.ModuleList:
        each: dict[int, dict[str, Tensor]] = defaultdict(dict)
        try:
            for name, tensor in load_file(path, device=device).items():
                number, _, rest = name.partition(".")
                each[int(number)][rest] = tensor
            made = [_filled(self, each[i]) for i in range(len(each))]
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{path} holds no {self.what} that fit together: {reason}. {self.train}"
            ) from error
        return nn.ModuleList(made).requires_grad_(False).eval()


def _filled(kind: Modules, tensors: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):  # so that no random number is drawn
        module = kind.make(tensors)
    module.load_state_dict(dict(tensors), assign=True)
    return module


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors to a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial)
    partial.replace(path)
