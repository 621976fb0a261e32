"""Prediction sets hold the truth as often as promised."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.conformal import make_sets


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_either_group_is_covered_whatever_the_calibration(level: float, power: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.beta(1, 4, size=40_000)
    y = (rng.random(len(truth)) < truth).astype(float)
    p = truth**power  # a model that is off
    sets = make_sets(y[:20_000], p[:20_000], p[20_000:], level=level)
    assert sets is not None
    found = sets.describe(y[20_000:])
    assert found["coverage_of_positives"] == pytest.approx(level, abs=0.015)
    assert found["coverage_of_negatives"] == pytest.approx(level, abs=0.015)
    assert found["only_yes"] + found["only_no"] + found["both"] <= 1


def test_the_bounds_of_ten_rows_by_hand() -> None:
    y = np.repeat([1.0, 0.0], 9)
    p = np.concatenate([np.arange(9, 0, -1), np.arange(9)]) / 10
    # Of nine in a group the eighth covers the next one with a chance of .8.
    sets = make_sets(y, p, np.array([0.19, 0.2, 0.7, 0.71]), level=0.8)
    assert sets is not None
    assert sets.yes.tolist() == [False, True, True, True]
    assert sets.no.tolist() == [True, True, True, False]
    found = sets.describe(np.array([0.0, 1.0, 1.0, 1.0]))
    assert found == {
        "level": 0.8,
        "coverage": 1.0,
        "coverage_of_positives": 1.0,
        "coverage_of_negatives": 1.0,
        "only_yes": 0.25,
        "only_no": 0.25,
        "both": 0.5,
    }
    missed = sets.describe(np.array([1.0, 0.0, 0.0, 0.0]))
    assert missed["coverage"] == 0.5
    assert missed["coverage_of_positives"] == 0.0
    assert missed["coverage_of_negatives"] == pytest.approx(2 / 3, abs=1e-6)
    nobody = sets.describe(np.zeros(4))
    assert nobody["coverage_of_positives"] is None


def test_few_rows_leave_everything_possible() -> None:
    sets = make_sets(np.array([0.0, 1.0]), np.array([0.1, 0.9]), np.array([0.5]), level=0.9)
    assert sets is not None
    assert sets.yes.all()
    assert sets.no.all()


def test_one_outcome_alone_decides_nothing() -> None:
    for value in (0.0, 1.0):
        y = np.full(5, value)
        assert make_sets(y, np.full(5, 0.5), np.full(2, 0.5), level=0.9) is None
    nan = np.full(2, np.nan)
    assert make_sets(np.array([0.0, 1.0]), nan, nan, level=0.9) is None
