"""A fixed sample of random prompts; ``tests/fuzz_oracle.py`` runs as many as one likes."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import fuzz_oracle


@pytest.mark.slow
def test_random_prompts_equal_the_mask_oracle():
    outcomes = Counter(outcome for _, outcome in fuzz_oracle.outcomes(200, seed=0))
    assert outcomes["equal"] >= 180
    assert set(outcomes) <= {"equal", "refused"}


def test_cases_repeat():
    assert fuzz_oracle.draw(3, 7) == fuzz_oracle.draw(3, 7) != fuzz_oracle.draw(4, 7)
