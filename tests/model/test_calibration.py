"""Corrections of probabilities and the choice of a threshold."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from pipelines.config import Objective
from pipelines.model.calibration import (
    Calibration,
    choose_threshold,
    fit_factor,
    fit_level,
    fit_probability,
)


def test_recovers_a_distortion() -> None:
    rng = np.random.default_rng(0)
    truth = 1 / (1 + np.exp(-rng.normal(-1, 1, size=(20_000, 1))))
    label = rng.random(truth.shape) < truth
    log_odds = np.log(truth / (1 - truth))
    distorted = 1 / (1 + np.exp(-(log_odds - 0.6) / 0.5))
    slope, shift = fit_probability(distorted, label, np.full(label.shape, True))
    assert slope == pytest.approx(0.5, abs=0.03)
    assert shift[0] == pytest.approx(0.6, abs=0.05)
    fixed = Calibration(slope={"purchase": slope}, shift={"purchase": shift})
    assert np.abs(fixed.probability(["purchase"], distorted[:, None])[:, 0] - truth).mean() < 0.01


@pytest.mark.parametrize(
    ("middle", "spread", "slope", "moved"),
    [
        (-3.0, 1.5, 0.7, 2.0),  # a sale: three times as many as predicted
        (-4.5, 1.2, 0.7, 3.0),
        (-1.0, 2.5, 0.7, 2.5),
        (-4.7, 0.6, 0.3, 4.0),
        (4.0, 2.0, 0.5, -5.0),  # the shop is closed
        (-2.0, 4.0, 0.1, 0.5),  # who bought often and who did not become alike
        (-4.7, 2.0, -0.4, 2.0),  # turned round, which no slope above zero can tell
    ],
)
def test_what_is_far_off_is_put_right(
    middle: float, spread: float, slope: float, moved: float
) -> None:
    rng = np.random.default_rng(1)
    odds = rng.normal(middle, spread, size=(20_000, 1))
    truth = 1 / (1 + np.exp(-(slope * (odds - middle) + middle + moved)))
    label = rng.random(truth.shape) < truth
    said = 1 / (1 + np.exp(-odds))
    found, shift = fit_probability(said, label, np.full(label.shape, True))
    corrected = 1 / (1 + np.exp(-(found * odds + shift)))
    # The prior of a hundred rows pulls, the more the further away it is.
    assert corrected.mean() == pytest.approx(label.mean(), rel=0.15)

    def lose(at: NDArray[np.float64]) -> float:
        z = at[0] * odds + at[1]
        return float((np.logaddexp(0, z) - label * z).sum() + 50 * ((at[0] - 1) ** 2 + at[1] ** 2))

    best = minimize(lose, [1.0, 0.0], bounds=[(0.05, None), (None, None)])
    assert lose(np.array([found, *shift])) <= best.fun + 0.01


@pytest.mark.parametrize("value", [False, True])
def test_labels_all_alike_stay_finite(value: bool) -> None:
    predicted = np.linspace(0.01, 0.99, 50)[:, None]
    known = np.full((50, 1), True)
    slope, shift = fit_probability(predicted, np.full((50, 1), value), known)
    assert np.isfinite([slope, *shift]).all()
    assert slope > 0


def test_few_rows_correct_little() -> None:
    rng = np.random.default_rng(3)
    predicted = np.full((40_000, 1), 0.2)
    label = rng.random(predicted.shape) < 0.4
    known = np.full(predicted.shape, True)
    moved = []
    for rows in (50, 1_000, 40_000):
        slope, shift = fit_probability(predicted[:rows], label[:rows], known[:rows])
        moved.append(Calibration(slope={"x": slope}, shift={"x": shift}))
    few, some, many = (float(c.probability(["x"], predicted[:1, None])[0, 0, 0]) for c in moved)
    assert 0.2 < few < some < many
    assert few < 0.25
    assert many == pytest.approx(0.4, abs=0.01)


def test_a_factor_trusts_a_total_as_far_as_it_has_buyers() -> None:
    alike = np.repeat([0.0, 3.0], 10_000)
    assert fit_factor(alike, np.ones(20_000)) == pytest.approx(1.5, rel=0.01)
    # As much in all, nearly all of it by one of them.
    one = np.append(np.full(9_999, 0.1), 29_000.0)
    assert 1.0 < fit_factor(one, np.full(10_000, 2.0)) < 1.01
    assert fit_factor(np.zeros(5), np.ones(5)) == 1.0
    assert fit_factor(np.ones(5), np.zeros(5)) == 1.0


@pytest.mark.parametrize("moved", [-6.0, -0.05, 0.0, 2.0, 12.0])
def test_a_level_is_that_of_the_other_model(moved: float) -> None:
    rng = np.random.default_rng(5)
    odds = rng.normal(-2.0, 1.5, size=(3_000, 1)) + np.array([0.0, 1.5])
    expected = 1 / (1 + np.exp(-odds))
    # Another order of the shoppers, and as much too high or too low for all of them.
    predicted = 1 / (1 + np.exp(-(rng.permutation(odds) - moved) / 0.8))
    wanted = expected.mean(axis=0)
    fixed = Calibration(slope={"x": 0.8}, shift={"x": fit_level(predicted, wanted, 0.8)})
    told = fixed.probability(["x"], predicted[:, None])[:, 0]
    assert told.mean(axis=0) == pytest.approx(wanted, abs=1e-3)


def test_open_windows_do_not_count() -> None:
    rng = np.random.default_rng(2)
    predicted = rng.uniform(0.1, 0.9, size=(500, 2))
    label = rng.random(predicted.shape) < predicted
    known = np.stack([np.full(500, True), np.arange(500) < 300], axis=1)
    other = np.where(known, label, ~label)
    assert fit_probability(predicted, label, known) == fit_probability(predicted, other, known)


def test_order_of_horizons_stays() -> None:
    calibration = Calibration(slope={"x": 1.2}, shift={"x": [0.5, -0.5]})
    # The second one's shift alone would put the longer horizon of near equals below the shorter.
    said = np.array([[[0.1, 0.9], [0.30, 0.31]], [[0.30, 0.31], [0.1, 0.9]]])
    result = calibration.probability(["other", "x"], said)
    assert (np.diff(result[:, 1]) >= 0).all()
    assert result[0, 1, 0] == result[0, 1, 1] == pytest.approx(0.3737, abs=1e-3)
    assert result[1, 1, 0] < result[1, 1, 1]
    # Of what no correction is known of, nothing changes.
    assert (result[:, 0] == said[:, 0]).all()


def test_an_amount_gets_the_factor_of_its_own_horizon() -> None:
    expected = np.array([0.0, 2.0])
    written = Calibration(slope={"x": 2.0}, shift={"x": [1.0]}, factor={"7": 1.5}).to_json()
    assert written == {"slope": {"x": 2.0}, "shift": {"x": [1.0]}, "factor": {"7": 1.5}}
    calibration = Calibration(**written)
    assert calibration.amount(7, expected).tolist() == [0.0, 3.0]
    assert calibration.amount(14, expected).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("objective", ["f1", "youden", "break_even"])
def test_a_threshold_is_best_by_its_objective(objective: Objective) -> None:
    rng = np.random.default_rng(1)
    p = rng.random(300).round(2)
    label = rng.random(300) < p**2

    def value(threshold: float) -> float:
        called = p >= threshold
        hits = int((called & label).sum())
        if objective == "f1":
            return 2 * hits / int(called.sum() + label.sum())
        if objective == "break_even":
            return -abs(int(called.sum()) - int(label.sum()))
        return hits / int(label.sum()) - int((called & ~label).sum()) / int((~label).sum())

    best = max(value(t) for t in np.unique(p))
    chosen = choose_threshold(p, label, objective)
    assert value(chosen) == pytest.approx(best)
    # Half-way between two predictions.
    assert np.abs(p - chosen).min() > 1e-4
    # All are called where that is best, whatever another run rounds to.
    if objective == "f1":
        assert choose_threshold(np.full(300, 0.3), label, objective) == pytest.approx(0.15)
    assert choose_threshold(p, np.zeros(300, dtype=bool), objective) == 0.5
    assert choose_threshold(p, np.ones(300, dtype=bool), objective) == 0.5


def test_objectives_differ() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(2000)
    label = rng.random(2000) < p**3
    objectives: tuple[Objective, ...] = ("f1", "youden", "break_even")
    assert len({choose_threshold(p, label, objective) for objective in objectives}) == 3
