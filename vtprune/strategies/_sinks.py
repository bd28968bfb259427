"""What strategies that look for sinks among the tokens of a layer share."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.interventions import Entering
from vtprune.scoring.sinks import find_sinks, known_dims
from vtprune.types import Facts

Dims = tuple[int, ...] | Literal["auto"] | None


def check_sinks(strategy: Any) -> None:
    """Raises ConfigError for ``dims`` or ``tau`` out of range; a list of dims becomes a tuple."""
    dims, tau = strategy.dims, strategy.tau
    if isinstance(dims, (list, tuple)):
        object.__setattr__(strategy, "dims", tuple(dims))
        known = bool(dims) and all(type(d) is int and d >= 0 for d in dims)
    else:
        known = dims in (None, "auto")
    if not known:
        raise ConfigError(f"dims={dims!r}: give hidden dimensions from 0 on, 'auto' or None.")
    numeric = isinstance(tau, (int, float)) and not isinstance(tau, bool)
    if tau is not None and not (numeric and math.isfinite(tau) and tau > 0):
        raise ConfigError(f"tau={tau!r} must be a number above 0, or None.")


def check_share(name: str, value: float) -> None:
    """Raises ConfigError for what is no share."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (numeric and 0 <= value <= 1):
        raise ConfigError(f"{name}={value!r} must be a share from 0 to 1.")


def dims_for(dims: Dims, facts: Facts) -> Dims:
    """Returns the dims of a model's sinks: those given or published, else ``auto``.

    Raises:
        ConfigError: the model is not as wide.
    """
    found = (known_dims(facts) or "auto") if dims is None else dims
    width = facts.decoder_width
    if isinstance(found, tuple) and width is not None and max(found) >= width:
        raise ConfigError(
            f"dims={found}: the hidden states of {facts.family} have dimensions 0 to {width - 1}."
        )
    return found


def marked(entering: Entering, dims: Dims, tau: float | None) -> Tensor:
    """Returns the sinks among the tokens that enter a layer, ``[B, n]`` bool."""
    own = dims if isinstance(dims, tuple) else None
    return find_sinks(entering.states, entering.first, own, tau) & entering.valid
