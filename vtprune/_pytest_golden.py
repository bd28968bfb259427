"""Gives pytest the option ``--golden`` in a checkout of this project, and nowhere else.

A conftest cannot: pytest takes a folder outside the checkout that follows an option it does not
know yet for a test path, and then never loads our conftest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Adds ``--golden DIR``."""
    if not Path("tests/golden_adapters").is_dir():
        return
    parser.addoption(
        "--golden",
        action="append",
        default=[],
        metavar="DIR",
        help="also run the recorded cases under DIR (may be repeated)",
    )
