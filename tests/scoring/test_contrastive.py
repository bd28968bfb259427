"""The relevance of two passes, by hand."""

from __future__ import annotations

import pytest
import torch

from vtprune import ConfigError, InputError
from vtprune.scoring.contrastive import contrastive, over_steps


def test_what_draws_attention_anyway_counts_one() -> None:
    asked, general = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.5, 0.1, 0.2])
    made = contrastive(asked.half(), general.half(), lam=0.0)
    assert made.dtype == torch.float32
    assert torch.allclose(made, torch.tensor([1.0, 2.0, 0.5]), rtol=1e-3)
    assert torch.equal(contrastive(torch.zeros(2), torch.zeros(2)), torch.zeros(2))


def test_later_steps_count_more() -> None:
    generator = torch.Generator().manual_seed(0)
    asked = torch.rand(4, 2, 5, generator=generator)
    general = torch.rand(3, 2, 5, generator=generator) + 0.1
    wanted = {"all": torch.zeros(5), "first": torch.zeros(5), "last": torch.zeros(5)}
    for layer in range(2):
        for step in range(3):
            ratio = asked[step, layer] / (general[step, layer] + 1e-8)
            wanted["all"] += (step + 1) * ratio
        wanted["first"] += asked[0, layer] / (general[0, layer] + 1e-8)
        wanted["last"] += asked[3, layer] / (general[2, layer] + 1e-8)
    for steps, value in wanted.items():
        assert torch.allclose(over_steps(asked, general, steps), value)  # type: ignore[arg-type]


def test_refuses() -> None:
    x = torch.rand(2, 2, 5)
    with pytest.raises(ConfigError, match="steps='middle' is unknown; choose one of 'first'"):
        over_steps(x, x, "middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="same images"):
        over_steps(x, x[..., 1:], "all")
    with pytest.raises(InputError, match="at least one step"):
        over_steps(x, x[:0], "all")
