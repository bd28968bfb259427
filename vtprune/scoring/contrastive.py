"""Relevance to a question as attention that a general instruction does not get.

T, U steps of decoding, NL layers, N visual tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError

Steps = Literal["first", "last", "all"]
LAMBDA = 1e-8  # official code of CARVE


def contrastive(asked: Tensor, general: Tensor, lam: float = LAMBDA) -> Tensor:
    """Returns ``asked / (general + lam)``, float32: what draws attention anyway counts 1.

    arXiv 2509.06461 (YuyaoGe/CARVE).

    Args:
        asked: attention to visual tokens under the question; general: under an instruction that
            asks for nothing in particular.
    """
    return asked.float() / (general.float() + lam)


def over_steps(asked: Tensor, general: Tensor, steps: Steps, lam: float = LAMBDA) -> Tensor:
    """Returns the relevance of each visual token, ``[N]`` float32, summed over layers and steps.

    Args:
        asked: ``[T, NL, N]``, attention of the token that says what comes next; general:
            ``[U, NL, N]``.
        steps: the ``first``, the ``last`` of each run, or ``all`` that both have, the later the
            more: step t (0-based) counts t + 1 times.

    Raises:
        ConfigError: other steps. InputError: no step, or other layers or tokens.
    """
    check_steps(steps)
    if asked.shape[1:] != general.shape[1:] or not len(asked) or not len(general):
        raise InputError(
            f"Attention has shapes {tuple(asked.shape)} and {tuple(general.shape)}; it must be of "
            "the same layers and visual tokens, and of at least one step. Give both runs the same "
            "images."
        )
    if steps != "all":
        at = 0 if steps == "first" else -1
        return contrastive(asked[at], general[at], lam).sum(0)
    n = min(len(asked), len(general))
    weight = torch.arange(1, n + 1, device=asked.device, dtype=torch.float32)
    return (weight[:, None, None] * contrastive(asked[:n], general[:n], lam)).sum((0, 1))


def check_steps(steps: str) -> None:
    """Raises ConfigError for steps that are unknown."""
    if steps not in get_args(Steps):
        known = ", ".join(map(repr, get_args(Steps)))
        raise ConfigError(f"steps={steps!r} is unknown; choose one of {known}.")
