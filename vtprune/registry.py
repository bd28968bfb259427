"""Finding strategies and adapters by name: folder scan, entry points, 'did you mean'."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeVar

import vtprune.strategies
import vtprune.vit_adapters
import vtprune.vlm_adapters
from vtprune.errors import ConfigError
from vtprune.types import Strategy
from vtprune.vit_adapters._base import ViTAdapter
from vtprune.vlm_adapters._base import VLMAdapter

T = TypeVar("T")


def _modules(package: ModuleType) -> dict[str, str]:
    """Public modules of ``package`` by file name, and those announced by other packages.

    Raises:
        ConfigError: two of them share a name.
    """
    found: dict[str, str] = {}
    named = [
        (m.name, f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
        if not m.name.startswith("_")
    ]
    named += [(point.name, point.value) for point in entry_points(group=package.__name__)]
    for name, path in named:
        if found.setdefault(name, path) != path:
            raise ConfigError(f"{name!r} is defined twice: {found[name]} and {path}; rename one.")
    return found


def _classes(module: str, base: type[T]) -> list[type[T]]:
    """Subclasses of ``base`` that ``module`` itself defines."""
    members = vars(importlib.import_module(module)).values()
    return [
        c for c in members if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module
    ]


def unknown(what: str, given: str, known: Iterable[str]) -> ConfigError:
    """Returns the error for a name that does not exist."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"Unknown {what} {given!r}. {hint}Known: {', '.join(names) or 'none'}.")


def strategy_names() -> list[str]:
    """Returns the names of all strategies, without importing them."""
    return sorted(_modules(vtprune.strategies))


def keeping_names() -> list[str]:
    """Returns the names of the strategies that keep a number of tokens, not all or none.

    Without those that need weights trained for the very model. It imports them.
    """
    classes = {name: strategy_class(name) for name in strategy_names()}
    kinds = ("select", "adaptive")
    return [name for name, cls in classes.items() if cls.kind in kinds and not cls.trained]


def strategy_class(name: str) -> type[Strategy]:
    """Returns the strategy class of that name.

    Raises:
        ConfigError: no strategy has that name, or its file does not define exactly one.
    """
    modules = _modules(vtprune.strategies)
    if name not in modules:
        raise unknown("strategy", name, modules)
    classes = _classes(modules[name], Strategy)
    if len(classes) != 1:
        raise ConfigError(f"{modules[name]} must define exactly one Strategy, not {len(classes)}.")
    return classes[0]


def read(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of a strategy as written: ``name`` or ``name(option=1)``.

    Raises:
        ConfigError: it is written in another way; values are Python literals.
    """
    if "(" not in text:
        return text.strip(), {}
    try:
        match ast.parse(text.strip(), mode="eval").body:
            case ast.Call(func=ast.Name(id=name), args=[], keywords=given):
                return name, {str(one.arg): ast.literal_eval(one.value) for one in given}
    except (SyntaxError, ValueError):
        pass
    raise ConfigError(
        f"Strategy {text!r} is not understood. Write a name, with options as in zipvl(tau=0.96)."
    )


def spell(text: str) -> str:
    """Returns the one spelling of a strategy as ``read`` takes it."""
    name, options = read(text)
    said = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return f"{name}({said})" if options else name


def build(strategy: str | Strategy, **options: object) -> Strategy:
    """Returns the strategy of that name with these options, or the given instance.

    A name may be written with options, as ``read`` takes them.

    Raises:
        ConfigError: unknown strategy or option, one given twice, or options beside an instance.
    """
    if isinstance(strategy, Strategy):
        if options:
            raise ConfigError(
                f"{', '.join(options)}: set options on the instance {strategy!r}, not beside it."
            )
        return strategy
    if not isinstance(strategy, str):
        raise ConfigError(f"strategy={strategy!r} is neither a name nor a Strategy.")
    name, written = read(strategy)
    cls = strategy_class(name)
    if twice := written.keys() & options.keys():
        raise ConfigError(f"{', '.join(sorted(twice))}: given twice; {strategy!r} says it already.")
    options |= written
    for name in options:
        if name not in cls.options():
            raise unknown(f"option of {strategy}", name, cls.options())
    return cls(**options)  # type: ignore[arg-type]


def adapter_classes() -> list[type[VLMAdapter]]:
    """Returns all model adapters."""
    modules = _modules(vtprune.vlm_adapters).values()
    return [cls for module in modules for cls in _classes(module, VLMAdapter)]


def vit_adapter_classes() -> list[type[ViTAdapter]]:
    """Returns all adapters of ViTs."""
    modules = _modules(vtprune.vit_adapters).values()
    return [cls for module in modules for cls in _classes(module, ViTAdapter)]


def family_notes() -> dict[str, tuple[type[VLMAdapter], str]]:
    """Returns per class name its adapter, and what is particular to the family."""
    notes: dict[str, tuple[type[VLMAdapter], str]] = {}
    for adapter in adapter_classes():
        text = inspect.getdoc(inspect.getmodule(adapter)) or ""
        first = " ".join(text.partition("\n\n")[0].split())
        notes |= {name: (adapter, first.partition(": ")[2]) for name in adapter.classes}
    return notes
