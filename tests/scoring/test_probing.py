from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import ConfigError, InputError
from vtprune.scoring.probing import accumulated, important, needed, per_viewer, probes

NAN = float("nan")


def test_probes_are_the_last_tokens_and_some_of_the_others():
    rows = probes(500).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 128
    assert rows[64:] == list(range(436, 500))
    assert rows[63] < 436
    assert rows == probes(500).tolist()
    assert rows != probes(500, seed=1).tolist()


def test_few_tokens_are_all_probes():
    for n in (1, 63, 64, 65, 127, 128):
        assert probes(n).tolist() == list(range(n))
    assert len(probes(129)) == 128
    assert probes(9, recent=2, chance=0).tolist() == [7, 8]


@pytest.mark.parametrize("wrong", [(0, 1, 1), (5, 0, 1), (5, 1, -1)])
def test_numbers_that_are_no_counts(wrong):
    with pytest.raises(ConfigError, match="give at least 1 token, 1 recent probe"):
        probes(*wrong)


def test_what_probes_attend_to_equals_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 37, 8, generator=generator)
    k = torch.randn(2, 2, 37, 8, generator=generator)
    rows = probes(37, 5, 7)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    logits = q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5
    whole = logits.masked_fill(~causal, -torch.inf).softmax(-1)[:, :, rows]
    mass = accumulated(q[:, :, rows], k, causal[rows])
    torch.testing.assert_close(mass, whole.sum(2).mean(1))
    torch.testing.assert_close(mass.sum(1), torch.full((2,), 12.0))
    viewers = (whole[0, 0] > 0).sum(0)
    torch.testing.assert_close(per_viewer(mass, causal[rows]), mass / viewers)


def test_a_token_that_no_probe_sees_scores_0():
    mass, seen = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])
    assert per_viewer(mass, seen).tolist() == [[1.0, 0.0]]


def test_the_number_is_the_least_that_reaches_the_share():
    mass = torch.tensor([[0.25, 0.5, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    for tau, wanted in [(0.1, [1, 1]), (0.5, [1, 1]), (0.51, [2, 1]), (0.875, [3, 1]), (1, [4, 1])]:
        assert needed(mass, tau, 1.0).tolist() == wanted
    assert needed(mass * 0.999, 1.0, 1.0).tolist() == [4, 4]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 9))
def test_one_token_less_is_not_enough(n, tau, seed):
    mass = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) + 0.01
    for row, p in zip(mass, needed(mass, tau, float(mass[0].sum())).tolist(), strict=True):
        best = row.double().sort(descending=True).values
        target = tau * float(mass[0].sum())
        assert p == n or best[:p].sum() >= target
        assert p == 1 or best[: p - 1].sum() < target


@pytest.mark.parametrize("tau", [0, -0.1, 1.01, NAN])
def test_a_share_that_is_none(tau):
    with pytest.raises(ConfigError, match="is no share of attention"):
        needed(torch.ones(1, 3), tau, 3.0)


def test_the_best_and_those_that_always_matter():
    scores = torch.tensor([[0.5, NAN, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]])
    always = torch.tensor([[False] * 4, [True, False, False, False]])
    chosen = important(scores, torch.tensor([2, 1]), always)
    assert chosen.tolist() == [[True, False, False, True], [True, False, False, True]]
    chosen = important(scores, torch.tensor([3, 4]), always)
    assert chosen.tolist() == [[True, False, True, True], [True] * 4]


def test_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"give \[B, n\], \[B\] and \[B, n\]"):
        important(torch.ones(2, 3), torch.ones(1), torch.ones(2, 3).bool())
