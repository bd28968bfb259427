"""Methods with recorded cases but without an adapter, and why. Anything else is a failure."""

from __future__ import annotations

_NO_STRATEGY = "no strategy of this name yet"

PENDING: dict[str, str] = {
    "psa": _NO_STRATEGY,
}
