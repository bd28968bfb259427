"""Lazy imports of optional dependencies."""

from __future__ import annotations

import importlib
from typing import Any


def scipy_ndimage() -> Any:
    """Imports ``scipy.ndimage`` or says which extra of vtprune brings it.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        return importlib.import_module("scipy.ndimage")
    except ImportError as error:
        raise ImportError(
            "scipy is not installed; it comes with pip install 'vtprune[eval]'."
        ) from error
