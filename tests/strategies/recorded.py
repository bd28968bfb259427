"""Faults that recorded cases must notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden_harness import GoldenError, check, find_adapter, find_cases

GOLDEN = Path(__file__).parents[1] / "golden"


def turns_red(
    method: str,
    where: Any,
    name: str,
    fault: Any,
    cases: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asserts that all cases of ``method`` hold, and none of ``cases`` with a fault in place."""
    adapter = find_adapter(method)
    assert not isinstance(adapter, str)
    found = find_cases(GOLDEN / method)
    for case in found:
        check(case, adapter)
    monkeypatch.setattr(where, name, fault)
    assert cases <= {case.path.stem for case in found}
    for case in found:
        if case.path.stem in cases:
            with pytest.raises(GoldenError, match="differs"):
                check(case, adapter)
