"""Levels of better and worse weeks are told from chance, and nobody is judged by them."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.model.levels import measure_odds, shrink, tell_weekdays, weigh


def draw(level: np.ndarray, shoppers: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of a time's shoppers buy, and how many there are."""
    buyers = np.random.default_rng(9).binomial(shoppers, 1 / (1 + np.exp(-level)))
    return buyers.astype(np.float64), np.full(level.shape, float(shoppers))


def test_odds_of_nobody_and_everybody_are_finite_and_tell_little() -> None:
    odds, information = measure_odds(
        np.array([0.0, 400.0, 100.0, 0.0]), np.array([400.0] * 3 + [0])
    )
    assert odds[0] == pytest.approx(-odds[1]) == pytest.approx(np.log(0.5 / 400.5))
    assert odds[2] == pytest.approx(np.log(1 / 3), abs=0.01)
    assert information[0] < 1
    assert information[2] == pytest.approx(75, abs=0.5)
    assert information[3] == 0


@pytest.mark.parametrize(("moves", "error"), [(0.0, 0.02), (0.5, 0.11)])
def test_levels_are_believed_as_far_as_they_are_more_than_chance(
    moves: float, error: float
) -> None:
    truth = np.random.default_rng(3).normal(-1.0, moves, size=(40, 2))
    odds, information = measure_odds(*draw(truth))
    found = shrink(odds, information)
    assert np.sqrt(np.mean((found - truth.mean(axis=0)) ** 2)) == pytest.approx(moves, abs=0.1)
    assert np.abs(odds - truth).mean() > 0.08  # as measured
    assert np.abs(found - truth).mean() < max(error, 0.05)


def test_a_time_of_few_lies_near_the_mean_and_one_of_none_there() -> None:
    truth = np.random.default_rng(3).normal(-1.0, 0.5, size=40)
    happened, counted = draw(truth)
    happened[:2], counted[:2] = [3, 0], [3, 0]
    odds, information = measure_odds(happened, counted)
    found = shrink(odds, information)
    mean = weigh(odds, information, np.zeros(40), None)
    assert odds[0] > mean + 2.5
    assert mean < found[0] < mean + 0.6
    assert found[1] == pytest.approx(mean)


def test_one_time_alone_and_nothing_known_have_no_moves() -> None:
    odds, information = measure_odds(np.array([[3.0], [0.0]]).T, np.array([[9.0], [0.0]]).T)
    found = shrink(odds, information)
    assert found.tolist() == [[pytest.approx(odds[0, 0]), 0.0]]


@pytest.mark.parametrize("step", [1, 3, 10])
def test_weekdays_are_told_from_weeks(step: int) -> None:
    rng = np.random.default_rng(5)
    weekday = np.arange(70) * step % 7
    effect = np.array([1.0, 0.5, 0.0, 0.0, 0.0, -0.5, -1.0])
    season = np.linspace(-2.0, 2.0, 70)
    information = rng.uniform(50, 100, size=70)
    level = season + effect[weekday] + rng.normal(0, 0.1, size=70)
    found = tell_weekdays(level, information, weekday)
    assert found == pytest.approx(effect[weekday], abs=0.1)
    # The last seven times alone tell as much as they can.
    found = tell_weekdays(level[-7:], information[-7:], weekday[-7:])
    assert found == pytest.approx(effect[weekday[-7:]], abs=0.5)


def test_times_of_one_weekday_have_nothing_of_it() -> None:
    level = np.random.default_rng(5).normal(size=40)
    one = np.full(40, 3)
    assert tell_weekdays(level, np.ones(40), one) == pytest.approx(np.zeros(40), abs=0.1)
    assert tell_weekdays(level, np.zeros(40), one).tolist() == [0.0] * 40
    assert tell_weekdays(level[:1], np.ones(1), one[:1]).tolist() == [0.0]


def test_old_times_count_less_for_the_latest_level() -> None:
    level, age = np.where(np.arange(30) < 20, -2.0, 0.0), 7.0 * np.arange(30)[::-1]
    information = np.ones(30)
    assert weigh(level, information, age, None) == pytest.approx(-4 / 3)
    assert weigh(level, information, age, 14.0) == pytest.approx(0.0, abs=0.08)
    # Half a level that is twice as old: 1 and 1/2.
    found = weigh(np.array([1.0, 4.0]), np.ones(2), np.array([7.0, 0.0]), 7.0)
    assert found == pytest.approx((0.5 * 1 + 4) / 1.5)
