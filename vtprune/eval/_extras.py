"""Lazy imports of optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, *, extra: str) -> ModuleType:
    """Imports ``module`` or says which extra of vtprune brings it.

    Raises:
        ImportError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed; it comes with "
            f"pip install 'vtprune[{extra}]'."
        ) from error
