"""vtprune: drop or merge the visual tokens that a vision-language model can do without.

Names are imported on first use, so that ``import vtprune`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vtprune import _versions as _versions  # a transformers that is too old says so at once

if TYPE_CHECKING:
    from vtprune.engine.plan import select, wrap
    from vtprune.engine.wrap import Handle
    from vtprune.errors import ConfigError, HookError, InputError, UnsupportedError, VTPruneError
    from vtprune.types import Budget, Selection, Signals, Strategy

__all__ = [
    "Budget",
    "ConfigError",
    "Handle",
    "HookError",
    "InputError",
    "Selection",
    "Signals",
    "Strategy",
    "UnsupportedError",
    "VTPruneError",
    "select",
    "wrap",
]
__version__ = "0.1.0"

_HOMES = {
    "vtprune.engine.plan": ("select", "wrap"),
    "vtprune.engine.wrap": ("Handle",),
    "vtprune.errors": (
        *("ConfigError", "HookError", "InputError", "UnsupportedError", "VTPruneError"),
    ),
    "vtprune.types": ("Budget", "Selection", "Signals", "Strategy"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
