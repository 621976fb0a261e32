from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.baselines.density import Density
from pipelines.baselines.histories import AMOUNT, COLUMNS, DAYS, OBSERVED
from pipelines.features.labels import Kind, Target

Floats = NDArray[np.float64]
BUY = Target(name="purchase_14d", kind=Kind.BINARY, event="purchase", horizon_days=14)
CHURN = Target(name="churn_14d", kind=Kind.BINARY, event=None, horizon_days=14)
SPEND = Target(name="spend_14d", kind=Kind.AMOUNT, event=None, horizon_days=14)
TARGETS = (BUY, CHURN, SPEND)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        yield


def histories(days: Floats, observed: Floats, amount: Floats | float = 0.0) -> Floats:
    x = np.zeros((len(days), len(COLUMNS)))
    x[:, DAYS], x[:, OBSERVED], x[:, AMOUNT] = days, observed, amount
    return x


def simulate(users: int = 40_000, a: float = 0.8, b: float = 20.0) -> tuple[Floats, Floats, Floats]:
    """Events so far, days observed, events in the 14 days ahead, at gamma-Poisson rates."""
    random = np.random.default_rng(5)
    rate = random.gamma(a, 1 / b, users)
    observed = random.uniform(0, 120, users)
    return random.poisson(rate * observed) * 1.0, observed, random.poisson(rate * 14) * 1.0


def test_it_is_calibrated_on_gamma_poisson_users() -> None:
    n, observed, later = simulate()
    half = len(n) // 2
    # The first day of all, which is not counted for events of any type.
    for target, first in ((BUY, 0.0), (CHURN, 1.0)):
        x = histories(n + first, observed)
        y = (later > 0) * 1.0 if target is BUY else (later == 0) * 1.0
        model = Density(target)
        model.fit(x[:half], y[:half])
        assert model.a == pytest.approx(0.8, rel=0.15)
        assert model.b == pytest.approx(20, rel=0.2)
        p, y = model.predict(x[half:]), y[half:]
        for rows in np.array_split(np.argsort(p), 10):
            assert p[rows].mean() == pytest.approx(y[rows].mean(), abs=0.035)


def test_expected_spend_is_calibrated() -> None:
    n, observed, later = simulate()
    random = np.random.default_rng(6)
    level = 1 / random.gamma(4, 1 / 60, len(n))
    past = np.where(n > 0, random.gamma(3 * np.maximum(n, 1), level), 0)
    y = np.where(later > 0, random.gamma(3 * np.maximum(later, 1), level), 0)
    x = histories(n, observed, past)
    half = len(n) // 2
    model = Density(SPEND)
    model.fit(x[:half], y[:half])
    p, y = model.predict(x[half:]), y[half:]
    assert p.sum() / y.sum() == pytest.approx(1, abs=0.08)
    top = p > np.quantile(p, 0.8)
    assert p[top].sum() / y[top].sum() == pytest.approx(1, abs=0.1)


def test_who_came_more_often_comes_more_likely_and_longer_horizons_help() -> None:
    x = histories(np.arange(6.0), np.full(6, 30.0))
    rows = []
    for days in (7, 14, 28):
        model = Density(Target(name="b", kind=Kind.BINARY, event="purchase", horizon_days=days))
        model.a, model.b = 0.5, 12.0
        rows.append(model.predict(x))
    assert (np.diff(rows, axis=0) > 0).all()
    assert (np.diff(rows, axis=1) > 0).all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize(
    "x",
    [
        histories(np.zeros(20), np.arange(20.0)),
        histories(np.zeros(1), np.zeros(1)),
        histories(np.full(30, 5000.0), np.full(30, 5000.0), 1e9),
    ],
    ids=["no event", "one user", "every day"],
)
def test_odd_data_are_no_error(target: Target, label: float, x: Floats) -> None:
    model = Density(target)
    model.fit(x, np.full(len(x), label))
    for rows in (x, histories(np.array([0, 900.0]), np.array([3000, 900.0]), 50.0)):
        p = model.predict(rows)
        assert np.isfinite(p).all()
        assert (p >= 0).all()
        assert target is SPEND or (p <= 1).all()


def test_labels_that_never_vary_are_followed() -> None:
    x = histories(np.arange(50.0) % 3 + 1, np.full(50, 40.0))
    for target in (BUY, CHURN):
        for label in (0.0, 1.0):
            model = Density(target)
            model.fit(x, np.full(50, label))
            assert model.predict(x) == pytest.approx(label, abs=0.02)
