from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from pipelines.evaluation.metrics import (
    HIGHER_IS_BETTER,
    amount_metrics,
    binary_metrics,
    calibration_error,
    chance_of_calibration_error,
    draw_weights,
    interval,
    summarise,
    summarise_all,
)

RANDOM = np.random.default_rng(0)
N = 600
P = np.round(RANDOM.random(N), 2)  # rounding makes ties
Y = (RANDOM.random(N) < P * 0.6).astype(float)
W = np.vstack([np.ones(N), RANDOM.integers(0, 4, N)])


@pytest.mark.parametrize("row", [0, 1])
def test_binary_metrics_equal_scikit_learn(row: int) -> None:
    ours = {k: v[row] for k, v in binary_metrics(Y, P, W, threshold=0.4).items()}
    w = W[row]
    called = P >= 0.4
    clipped = np.clip(P, 1e-7, 1 - 1e-7)
    theirs = {
        "roc_auc": sk.roc_auc_score(Y, P, sample_weight=w),
        "pr_auc": sk.average_precision_score(Y, P, sample_weight=w),
        "log_loss": sk.log_loss(Y, clipped, sample_weight=w),
        "brier": sk.brier_score_loss(Y, P, sample_weight=w),
        "accuracy": sk.accuracy_score(Y, called, sample_weight=w),
        "precision": sk.precision_score(Y, called, sample_weight=w),
        "recall": sk.recall_score(Y, called, sample_weight=w),
        "f1": sk.f1_score(Y, called, sample_weight=w),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name


def test_many_samples_are_measured_as_each_by_itself() -> None:
    weights = np.random.default_rng(4).integers(0, 3, (37, N)).astype(float)
    together = binary_metrics(Y, P, weights, threshold=0.4) | amount_metrics(3 * Y, P, weights)
    for row in (0, 15, 16, 36):
        alone = weights[row : row + 1]
        single = binary_metrics(Y, P, alone, threshold=0.4) | amount_metrics(3 * Y, P, alone)
        for name, values in together.items():
            assert values.shape == (37,)
            assert values[row] == pytest.approx(single[name][0]), name


def test_better_predictions_are_told_to_be_better_by_every_metric() -> None:
    ones = np.ones((1, N))
    good = binary_metrics(Y, np.clip(Y, 0.01, 0.99), ones, threshold=0.5)
    bad = binary_metrics(Y, np.clip(1 - Y, 0.01, 0.99), ones, threshold=0.5)
    amounts = np.random.default_rng(3).gamma(0.5, 40, N)
    good |= amount_metrics(amounts, amounts, ones)
    bad |= amount_metrics(amounts, amounts[::-1], ones)
    assert good.keys() == HIGHER_IS_BETTER.keys()
    del good["total_ratio"]  # best at 1
    for name, value in good.items():
        better, worse = (value, bad[name]) if HIGHER_IS_BETTER[name] else (bad[name], value)
        assert better[0] > worse[0], name


def test_calling_begins_at_the_threshold() -> None:
    y, p, ones = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.4, 0.4, 0.3]), np.ones((1, 4))
    found = binary_metrics(y, p, ones, threshold=0.4)
    assert (found["precision"][0], found["recall"][0]) == (pytest.approx(2 / 3), 1.0)
    nobody = binary_metrics(y, p, ones, threshold=0.95)
    assert (nobody["precision"][0], nobody["recall"][0], nobody["f1"][0]) == (0, 0, 0)


def test_a_probability_of_one_that_is_wrong_has_a_finite_loss() -> None:
    found = binary_metrics(np.array([0.0, 1.0]), np.array([1.0, 1.0]), np.ones((1, 2)), threshold=1)
    assert found["log_loss"][0] == pytest.approx(-np.log(1e-7) / 2, rel=1e-6)


def test_a_weight_is_a_repeated_row() -> None:
    repeats = W[1].astype(int)
    weighted = binary_metrics(Y, P, W, threshold=0.4)
    repeated = binary_metrics(
        np.repeat(Y, repeats), np.repeat(P, repeats), np.ones((1, repeats.sum())), threshold=0.4
    )
    for name in ("roc_auc", "pr_auc", "lift_at_10pct", "f1"):
        assert weighted[name][1] == pytest.approx(repeated[name][0]), name


def test_one_class_only_is_undefined_not_an_error() -> None:
    found = binary_metrics(np.zeros(N), P, W, threshold=0.4)
    assert np.isnan(found["roc_auc"]).all()
    assert summarise(found["roc_auc"], 0.95) == {"value": None, "low": None, "high": None}
    assert np.isfinite(found["brier"]).all()


def test_calibrated_predictions_have_little_error_and_biased_ones_have_theirs() -> None:
    p = np.random.default_rng(1).random(200_000)
    y = (np.random.default_rng(2).random(200_000) < p).astype(float)
    ones = np.ones((1, len(p)))
    assert calibration_error(y, p, ones)[0] < 0.005
    assert calibration_error(y, p * 0.5, ones)[0] == pytest.approx(0.25, abs=0.01)
    assert calibration_error(y, np.full_like(p, 0.3), ones)[0] == pytest.approx(0.2, abs=0.01)


def test_calibration_error_that_chance_leaves() -> None:
    random = np.random.default_rng(5)
    p = random.random(2000) ** 2
    ones = np.ones((1, len(p)))
    chance = chance_of_calibration_error(p, samples=400, confidence=0.95, seed=1)
    assert chance["mean"] is not None
    assert chance["high"] is not None
    # In each of ten bins of 200 the mean outcome is off by a half-normal deviate.
    tenths = np.sort(p).reshape(10, 200)
    by_hand = np.sqrt(2 / np.pi * (tenths * (1 - tenths)).mean(axis=1) / 200).mean()
    assert chance["mean"] == pytest.approx(by_hand, rel=0.03)
    seen = [calibration_error(random.random(len(p)) < p, p, ones)[0] for _ in range(400)]
    assert 0.91 < np.mean(np.array(seen) <= chance["high"]) < 0.98
    assert calibration_error(random.random(len(p)) < 0.8 * p, p, ones)[0] > chance["high"]


def test_lift_of_a_perfect_and_of_a_blind_order() -> None:
    y = np.zeros(1000)
    y[:100] = 1
    ones = np.ones((1, 1000))
    assert binary_metrics(y, y, ones, threshold=0.5)["lift_at_10pct"][0] == pytest.approx(10)
    blind = np.full(1000, 0.1)
    assert binary_metrics(y, blind, ones, threshold=0.5)["lift_at_10pct"][0] == pytest.approx(1)


def test_a_tenth_that_ends_within_a_row_takes_its_share_of_it() -> None:
    y, p = np.zeros(25), np.linspace(1, 0, 25)
    y[[0, 2]] = 1, 3  # two and a half rows are a tenth
    ones = np.ones((1, 25))
    assert amount_metrics(y, p, ones)["top_decile_capture"][0] == pytest.approx(2.5 / 4)
    assert binary_metrics(y > 0, p, ones, threshold=0.5)["lift_at_10pct"][0] == pytest.approx(7.5)
    p[1:4] = 0.9  # a tie of three: half of it is inside
    assert amount_metrics(y, p, ones)["top_decile_capture"][0] == pytest.approx(2.5 / 4)
    y[1], y[2] = 3, 0
    assert amount_metrics(y, p, ones)["top_decile_capture"][0] == pytest.approx(2.5 / 4)


def test_amount_metrics_at_their_ends() -> None:
    y = np.random.default_rng(3).gamma(0.5, 40, 2000)
    ones = np.ones((1, len(y)))
    perfect = amount_metrics(y, y, ones)
    assert perfect["gini"][0] == pytest.approx(1)
    assert perfect["mae"][0] == 0
    assert perfect["total_ratio"][0] == pytest.approx(1)
    top = np.sort(y)[-200:].sum() / y.sum()
    assert perfect["top_decile_capture"][0] == pytest.approx(top, abs=1e-6)
    above = np.where(np.arange(len(y)) % 2, y + 3, y - 1)
    assert amount_metrics(y, above, ones)["mae"][0] == pytest.approx(2)
    blind = amount_metrics(y, np.full_like(y, 2 * y.mean()), ones)
    assert blind["gini"][0] == pytest.approx(0, abs=1e-9)
    assert blind["total_ratio"][0] == pytest.approx(2)
    assert amount_metrics(y, -y, ones)["gini"][0] == pytest.approx(-1)


def test_bootstrap_weights_are_seeded_and_by_user() -> None:
    users = np.repeat(np.arange(50), 3).astype(np.int32)
    weights = draw_weights(users, samples=200, seed=5)
    assert (weights[0] == 1).all()
    assert (weights.reshape(201, 50, 3).std(axis=2) == 0).all()
    assert (weights[1:].sum(axis=1) == 150).all()
    np.testing.assert_array_equal(weights, draw_weights(users, samples=200, seed=5))
    assert (weights != draw_weights(users, samples=200, seed=6)).any()
    # Users are drawn with replacement: a third of them is not in a sample.
    assert (weights[1:] == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.02)
    assert (weights[1:].std(axis=0) > 0).all()


def test_samples_that_tell_nothing_are_left_out_and_the_value_itself_is_no_sample() -> None:
    samples = np.array([50.0, np.nan, *range(1, 102), np.inf])
    told = summarise(samples, 0.9)
    assert told == {"value": 50.0, "low": 6.0, "high": 96.0}
    both = summarise_all({"roc_auc": samples, "ece": samples}, 0.9)
    assert both == {"roc_auc": told, "ece": {"value": 50.0, "low": None, "high": None}}


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(9)
    users = np.arange(300, dtype=np.int32)
    covered = 0
    for trial in range(200):
        y = (random.random(300) < 0.3).astype(float)
        weights = draw_weights(users, samples=200, seed=trial)
        low, high = interval((weights @ y / weights.sum(1))[1:], 0.9)
        assert low is not None
        assert high is not None
        covered += low <= 0.3 <= high
    assert 0.82 < covered / 200 < 0.97
