"""Learning rates over a run."""

import pytest

from mambastyle.training.schedules import cosine


def test_a_cosine_falls_from_one_to_zero_and_stays_there():
    assert [cosine(step, 8) for step in (0, 4, 8, 9)] == pytest.approx([1, 0.5, 0, 0])
    rates = [cosine(step, 8) for step in range(9)]
    assert rates == sorted(rates, reverse=True)
