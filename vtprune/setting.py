"""A setting in a file: strategy, options and budget as YAML, as ``vtprune tune`` writes them.

    strategy: hiprune
    options: {alpha: 0.1}
    keep: 0.25
    measured: {model: mini-llava, drop: 0.3}

``keep`` is a count or a share, ``reduce`` stands in its place for ViTs, and strategies from which
no token leaves have neither. What is ``measured`` is for people: nothing depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.registry import unknown

SUFFIXES = (".yaml", ".yml")
KEYS = ("strategy", "options", "keep", "reduce", "measured")


@dataclass(frozen=True)
class Setting:
    """What ``wrap`` is told: a strategy's name, its options, and ``keep`` or ``reduce``."""

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: int | float | None = None
    reduce: int | float | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spelled(self) -> str:
        """The strategy with its options in one text, as ``--strategy`` takes it."""
        said = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.strategy}({said})" if said else self.strategy

    def text(self) -> str:
        """Returns the file's text; what is empty is left out."""
        rows = {key: _plain(getattr(self, key)) for key in KEYS}
        told = {key: value for key, value in rows.items() if value not in (None, {})}
        return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)


def is_setting(strategy: object) -> TypeGuard[str | PathLike[str]]:
    """Whether a strategy is given as a file: a path, or text that ends like one of YAML."""
    return isinstance(strategy, PathLike) or (
        isinstance(strategy, str) and strategy.endswith(SUFFIXES)
    )


def read_setting(file: str | PathLike[str], **beside: object) -> Setting:
    """Returns the setting in a file.

    Args:
        file: its path, which ends in ``.yaml`` or ``.yml``.
        **beside: what was said beside the file, by name; None = nothing.

    Raises:
        ConfigError: something was said beside it, there is no such file, or what is in it is
            damaged, lacks a key, has one that is not known, or a value that cannot be.
    """
    if twice := [name for name, value in beside.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(twice)}: {file} says what strategy, options and budget are. Leave it out, "
            "or give the strategy by its name."
        )
    found = _load(Path(file))
    if odd := [key for key in found if key not in KEYS]:
        raise ConfigError(f"{file}: {unknown('key', str(odd[0]), KEYS)}")
    try:
        return _setting(found)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _setting(found: dict[Any, Any]) -> Setting:
    name, options = found.get("strategy"), found.get("options", {})
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(
            f"strategy is {name!r}. Give the name of one, as in 'strategy: fastervlm'; what "
            "belongs in its brackets stands under options."
        )
    keep: Any = found.get("keep")
    reduce = found.get("reduce")
    if "keep" in found:
        Budget.of(keep)
    if "reduce" in found:
        if "keep" in found:
            raise ConfigError("keep and reduce both say what stays. Give one of them.")
        _check_reduce(reduce)
    measured = _mapping("measured", found.get("measured", {}))
    return Setting(name, _mapping("options", options), keep, reduce, measured)


def _check_reduce(reduce: object) -> None:
    whole = isinstance(reduce, int) and not isinstance(reduce, bool) and reduce >= 1
    if not whole and not (isinstance(reduce, float) and 0 < reduce < 1):
        raise ConfigError(
            f"reduce={reduce!r} is not known. Give tokens that leave per block of a ViT, such as "
            "8, or the share of FLOPs that is saved, such as 0.5."
        )


def _mapping(key: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{key} is {given!r}. Give names with values, as in '{key}: {{a: 1}}'.")
    return {name: _value(f"{key}, {name}", value) for name, value in given.items()}


def _value(where: str, value: Any) -> Any:
    """Returns a value as Python's strategies take it: lists become tuples."""
    if isinstance(value, list):
        return tuple(_value(where, one) for one in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no number. Give a finite one.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: {value!r} is no number, text, yes or no, or list of them.")


def _plain(value: Any) -> Any:
    """Returns tuples as lists and mappings as dictionaries, which YAML has."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[Any, Any]:
    """Returns the mapping in a file of YAML."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} is no file of a setting; its name would end in .yaml.")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Give a file that vtprune tune wrote."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged or no YAML: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds no setting. Give one, as in 'strategy: fastervlm' and 'keep: 0.25'."
        )
    return found
