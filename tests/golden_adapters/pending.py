"""Methods with recorded cases but without an adapter, and why. Anything else is a failure."""

from __future__ import annotations

_NO_STRATEGY = "no strategy of this name yet"

PENDING: dict[str, str] = {
    "dycoke": _NO_STRATEGY,
    "evs": _NO_STRATEGY,
    "fastvid": _NO_STRATEGY,
    "holitom": _NO_STRATEGY,
    "mdi_aei": _NO_STRATEGY,
    "psa": _NO_STRATEGY,
    "var": _NO_STRATEGY,
    "vcast": _NO_STRATEGY,
    "vidcom2": _NO_STRATEGY,
}
