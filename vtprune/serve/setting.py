"""What an engine is told under ``vtprune`` in a model's configuration.

    {"strategy": "fastervlm", "keep": 0.25}
    {"strategy": "hiprune", "options": {"alpha": 0.2}, "keep": 64}
    {"strategy": null}

The last prunes nothing: the engine then only takes images as embeddings of any counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtprune.errors import ConfigError
from vtprune.registry import build, unknown
from vtprune.types import Budget, Newlines, Positions, Scope, Strategy

KEY = "vtprune"
KEYS = ("strategy", "options", "keep", "scope", "positions", "newlines", "measured")
EXAMPLE = '{"vtprune": {"strategy": "fastervlm", "keep": 0.25}}'


@dataclass(frozen=True)
class Setting:
    """A strategy with what ``wrap`` takes beside it; the strategy's own where it is None."""

    strategy: Strategy
    budget: Budget
    scope: Scope | None = None
    positions: Positions | None = None
    newlines: Newlines | None = None


def read_setting(config: Any) -> Setting | None:
    """Returns what the configuration of a model says; None = prune nothing.

    Args:
        config: a configuration of transformers, into which ``--hf-overrides`` went.

    Raises:
        ConfigError: it says nothing, says it in another way, names an unknown key, strategy or
            option, or a value out of range.
    """
    told = getattr(config, KEY, None)
    if told is None:
        raise ConfigError(
            f"The configuration says nothing under {KEY!r}, so nothing would be pruned. Give "
            f"--hf-overrides with {EXAMPLE} beside the architecture, or write that key into the "
            "checkpoint's config.json."
        )
    if not isinstance(told, Mapping):
        raise ConfigError(f"{KEY!r} is {told!r} in the configuration; give keys as in {EXAMPLE}.")
    if odd := [key for key in told if key not in KEYS]:
        raise unknown(f"key under {KEY!r}", str(odd[0]), KEYS)
    if "strategy" not in told:
        raise ConfigError(f"{KEY!r} names no strategy; give one as in {EXAMPLE}, or null for none.")
    if told["strategy"] is None:
        return _none(told)
    return _setting(told)


def _none(told: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is said of a strategy where none is named."""
    if beside := [key for key in told if key not in ("strategy", "measured")]:
        raise ConfigError(f"{', '.join(beside)}: no strategy is named under {KEY!r}; leave it out.")


def _setting(told: Mapping[str, Any]) -> Setting:
    name, options = told["strategy"], told.get("options") or {}
    if not isinstance(name, str):
        raise ConfigError(
            f"strategy={name!r}: an engine runs one strategy. Name one as in {EXAMPLE}; what "
            "several choose in turn is served by vtprune.serve.to_vllm_inputs."
        )
    if not isinstance(options, Mapping):
        raise ConfigError(f"options={options!r}; give names with values, as in {{'alpha': 0.2}}.")
    strategy = build(name, **{option: _tuples(value) for option, value in options.items()})
    if strategy.kind == "compute":
        raise ConfigError(
            f"{strategy.name} lets no token leave, but says what layers compute of them, which an "
            "engine's own kernels do. Use it in transformers, by vtprune.wrap."
        )
    if told.get("keep") is None:
        raise ConfigError(f"keep is missing under {KEY!r}; give it as in {EXAMPLE}.")
    beside = {key: told.get(key) for key in ("scope", "positions", "newlines")}
    return Setting(strategy, Budget.of(told["keep"]), **beside)


def _tuples(value: Any) -> Any:
    """Returns a value of JSON as strategies take it."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
