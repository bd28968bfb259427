"""The predictor of Sparsifiner, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtprune.scoring.connectivity import (
    Connectivity,
    among_highest,
    connections,
    highest,
    n_seen,
)

H, S, D, M = 2, 13, 8, 10


def drawn(seed: int = 0) -> tuple[Connectivity, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = Connectivity(S, D, M)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator)
    torch.nn.init.normal_(made.up, std=0.05, generator=generator)
    q, k = torch.randn(2, 2, H, S, D, generator=generator)
    return made.requires_grad_(False), q, k


def reference(made: Connectivity, q: Tensor, k: Tensor) -> Tensor:
    """The guess, a query at a time: ``[B, H, S, S]`` float64."""
    q, k = q.double(), k.double()
    w = {name: p.double() for name, p in made.named_parameters()}
    out = torch.zeros(*q.shape[:3], S, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(H):
            narrow = k[b, h] @ w["k.weight"].T + w["k.bias"]
            for i in range(S):
                query = w["q.weight"] @ q[b, h, i] + w["q.bias"]
                coefficients = (narrow.T @ w["down"]).T @ query
                share = (coefficients / math.sqrt(H)).softmax(0)
                for m in share.argsort(descending=True)[:8]:
                    basis = w["up"][:, m].abs()
                    out[b, h, i] += share[m] * torch.where(basis > 0.02, basis, 0.0)
    return out


def test_the_guess_is_that_of_the_definition() -> None:
    made, q, k = drawn()
    torch.testing.assert_close(made.approximate(q, k), reference(made, q, k).float())


def test_tokens_that_left_are_as_tokens_that_are_hidden() -> None:
    made, q, k = drawn()
    left = torch.tensor([[0, 2, 3, 7, 12], [0, 1, 4, 5, 11]])
    at = left[:, None, :, None].expand(-1, H, -1, D)
    guess = made.approximate(q.gather(2, at), k.gather(2, at), left)
    for b, places in enumerate(left.tolist()):
        alone = Connectivity(len(places), D, M)
        state = made.state_dict()
        alone.load_state_dict({**state, **{n: state[n][places] for n in ("down", "up")}})
        one = alone.approximate(q[b : b + 1, :, places], k[b : b + 1, :, places])
        torch.testing.assert_close(guess[b : b + 1], one)


def test_ties_go_to_the_first_and_nan_is_the_lowest() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [math.nan, 0.0, -math.inf, 0.0, math.nan]])
    assert among_highest(x, 2).int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert highest(x[:1], 3, zero=0.0).tolist() == [[0.0, 2.0, 2.0, 0.0, 2.0]]


@pytest.mark.parametrize("n_prefix", [0, 1, 3])
def test_each_query_sees_its_budget_and_the_prefix_all(n_prefix: int) -> None:
    guess = torch.rand(2, H, S, S, generator=torch.Generator().manual_seed(0))
    seen = connections(guess, n_prefix, 4, None)
    assert seen[:, :, :n_prefix].all()
    assert (seen[:, :, n_prefix:].sum(-1) == 4).all()
    kept = guess[:, :, n_prefix:].masked_fill(~seen[:, :, n_prefix:], 2).amin(-1)
    left = guess[:, :, n_prefix:].masked_fill(seen[:, :, n_prefix:], -1).amax(-1)
    assert (kept > left).all()


def test_nobody_sees_padding() -> None:
    guess = torch.rand(2, H, S, S, generator=torch.Generator().manual_seed(0))
    real = torch.arange(S) < torch.tensor([[S], [3]])
    seen = connections(guess, 1, 5, real)
    assert torch.equal(seen[:1], connections(guess[:1], 1, 5, None))
    assert not seen[1, :, :, 3:].any()
    assert seen[1, :, :, :3].all()


def test_counts_are_rounded_up() -> None:
    assert [n_seen(0.25, n) for n in (197, 65, 50, 1)] == [50, 17, 13, 1]
