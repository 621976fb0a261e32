"""Every test turns warnings of NumPy into errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import check_grad
from scipy.special import hyp2f1

from pipelines.baselines.bgnbd import BgNbd, BuyTillYouDie, GammaGamma, log_likelihood
from pipelines.baselines.histories import AGE, AMOUNT, COLUMNS, DAYS, OBSERVED, SPAN
from pipelines.features.labels import Kind

Floats = NDArray[np.float64]
# What Fader, Hardie & Lee (2005) report for CDNOW, in weeks.
CDNOW = {"r": 0.243, "alpha": 4.414, "a": 0.793, "b": 2.426}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        yield


def simulate(
    random: np.random.Generator, model: BgNbd, age: Floats, ahead: float
) -> tuple[Floats, Floats, Floats]:
    """Repeat purchases, recency, and purchases in the time ahead, of one buyer per age."""
    rate = random.gamma(model.r, 1 / model.alpha, len(age))
    leaving = random.beta(model.a, model.b, len(age))
    x, recency, later = (np.zeros(len(age)) for _ in range(3))
    now, alive = np.zeros(len(age)), np.ones(len(age), bool)
    while True:
        now = now + random.exponential(1, len(age)) / np.maximum(rate, 1e-12)
        alive &= now <= age + ahead
        if not alive.any():
            return x, recency, later
        past = alive & (now <= age)
        x += past
        recency = np.where(past, now, recency)
        later += alive & ~past
        alive &= random.random(len(age)) >= leaving


def one(value: float) -> Floats:
    return np.array([float(value)])


def histories(days: Floats, span: Floats, age: Floats, amount: Floats | float = 0.0) -> Floats:
    x = np.zeros((len(days), len(COLUMNS)))
    x[:, DAYS], x[:, SPAN], x[:, AGE], x[:, AMOUNT] = days, span, age, amount
    x[:, OBSERVED] = age
    return x


def test_the_parameters_are_found_again() -> None:
    random = np.random.default_rng(1)
    truth = BgNbd(r=0.8, alpha=10.0, a=0.8, b=2.5)
    age = random.uniform(30, 300, 20_000)
    x, recency, _ = simulate(random, truth, age, 0.0)
    found = BgNbd()
    found.fit(x, recency, age)
    assert found.r == pytest.approx(truth.r, rel=0.1)
    assert found.alpha == pytest.approx(truth.alpha, rel=0.15)
    assert found.a == pytest.approx(truth.a, rel=0.2)
    assert found.a / (found.a + found.b) == pytest.approx(0.8 / 3.3, rel=0.1)


@pytest.mark.parametrize("a", [0.4, 1.0, 2.0])
def test_predictions_agree_with_a_simulation(a: float) -> None:
    random = np.random.default_rng(2)
    model = BgNbd(r=0.9, alpha=20.0, a=a, b=2.0)
    age = np.full(400_000, 60.0)
    x, recency, later = simulate(random, model, age, 28.0)
    for group in (x == 0, x == 1, (x >= 2) & (recency > 40), (x >= 2) & (recency < 40)):
        rows = (x[group], recency[group], age[group])
        n = group.sum()
        probability = model.probability(*rows, 28.0).mean()
        expected = model.expected(*rows, 28.0).mean()
        bought, count = later[group] > 0, later[group]
        assert probability == pytest.approx(bought.mean(), abs=4 * bought.std() / n**0.5)
        assert expected == pytest.approx(count.mean(), abs=4 * count.std() / n**0.5)


def test_the_published_example_comes_out() -> None:
    # Two repeat purchases, the last in week 30.43 of 38.86: 1.226 more in 39 weeks.
    expected = BgNbd(**CDNOW).expected(one(2), one(30.43), one(38.86), 39.0)
    assert expected[0] == pytest.approx(1.226, abs=1e-3)


def test_the_integral_is_the_closed_form() -> None:
    model = BgNbd(r=1.3, alpha=15.0, a=2.5, b=3.0)
    x, recency, age, t = np.arange(8.0), np.arange(8.0) * 9, np.full(8, 80.0), 28.0
    s, c = model.r + x, model.a + model.b + x - 1
    shrunk = ((model.alpha + age) / (model.alpha + age + t)) ** s
    shrunk = shrunk * hyp2f1(s, model.b + x, c, t / (model.alpha + age + t))
    closed = c / (model.a - 1) * (1 - shrunk) * model.alive(x, recency, age)
    np.testing.assert_allclose(model.expected(x, recency, age, t), closed, rtol=1e-9)


def test_the_gradient_is_that_of_the_likelihood() -> None:
    x, recency, age = np.array([0, 1, 4.0]), np.array([0, 2, 30.0]), np.array([9, 9, 31.0])
    at = np.array([0.7, 5.0, 0.6, 2.0])
    error = check_grad(
        lambda p: log_likelihood(p, x, recency, age)[0].sum(),
        lambda p: log_likelihood(p, x, recency, age)[1].sum(axis=1),
        at,
    )
    assert error < 1e-4


def test_a_longer_horizon_is_never_less_likely() -> None:
    model = BgNbd(**CDNOW)
    x, recency, age = np.arange(5.0), np.arange(5.0) * 7, np.full(5, 40.0)
    days = [0.5, 1, 7, 14, 28, 365, 100_000]
    probability = np.array([model.probability(x, recency, age, d) for d in days])
    expected = np.array([model.expected(x, recency, age, d) for d in days])
    assert (np.diff(probability, axis=0) > 0).all()
    assert (np.diff(expected, axis=0) > 0).all()
    assert (probability < expected).all()
    assert (probability <= model.alive(x, recency, age)).all()


def test_a_long_silence_says_that_the_buyer_left() -> None:
    model = BgNbd(**CDNOW)
    alive = model.alive(np.full(3, 5.0), np.array([10, 30, 50.0]), np.full(3, 50.0))
    assert (np.diff(alive) > 0).all()


def test_amounts_are_found_again_and_shrunk() -> None:
    random = np.random.default_rng(3)
    p, q, gamma = 4.0, 3.5, 60.0
    n = random.integers(1, 8, 20_000).astype(float)
    nu = random.gamma(q, 1 / gamma, len(n))
    total = random.gamma(p * n, 1 / nu)
    model = GammaGamma()
    model.fit(n, total / n)
    assert model.p == pytest.approx(p, rel=0.1)
    assert model.q == pytest.approx(q, rel=0.05)
    assert model.gamma == pytest.approx(gamma, rel=0.1)
    few, many = model.expected(one(1), one(500)), model.expected(one(50), one(500))
    mean = p * gamma / (q - 1)
    assert mean < few[0] < many[0] < 500
    assert model.expected(one(0), one(0))[0] == pytest.approx(mean, rel=0.05)


def test_who_never_bought_gets_the_rate_of_such_users() -> None:
    days = np.repeat([0.0, 3.0], 50)
    x = histories(days, np.where(days > 0, 20.0, 0), np.where(days > 0, 30.0, 0), days * 9)
    y = np.tile([0.0, 0, 0, 0, 1], 20)
    for kind in Kind:
        model = BuyTillYouDie(kind, 14, x)
        model.fit(x, y)
        p = model.predict(x)
        assert p[:50] == pytest.approx(0.2)
        assert (p[50:] != 0.2).all()


@pytest.mark.parametrize(
    "x",
    [
        histories(np.zeros(20), np.zeros(20), np.zeros(20)),
        histories(one(1), one(0), one(0)),
        histories(one(5), one(40), one(40), 100.0),
        histories(np.ones(30), np.zeros(30), np.arange(30.0)),
        histories(np.full(30, 200.0), np.full(30, 199.0), np.full(30, 199.0), 1e9),
        histories(np.full(9, 4000.0), np.full(9, 4000.0), np.full(9, 4000.0), 1e-3),
    ],
    ids=["nobody bought", "one today", "one user", "no repeats", "every day", "ten years"],
)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_odd_data_are_no_error(x: Floats, label: float) -> None:
    for kind in Kind:
        model = BuyTillYouDie(kind, 28, x)
        model.fit(x, np.full(len(x), label))
        strange = histories(
            np.array([0, 1, 1, 300.0]), np.array([0, 0, 0, 300.0]), np.array([0, 0, 3000, 300.0])
        )
        for rows in (x, strange):
            p = model.predict(rows)
            assert np.isfinite(p).all()
            assert (p >= 0).all()
            assert kind is Kind.AMOUNT or (p <= 1).all()
        assert model.predict(x[:0]).shape == (0,)


def test_a_second_fit_gives_the_same_bytes() -> None:
    random = np.random.default_rng(4)
    age = random.uniform(0, 100, 500)
    x, recency, _ = simulate(random, BgNbd(r=1.0, alpha=20.0, a=1.0, b=3.0), age, 0.0)
    rows = histories(x + 1, recency, age, x * 10)
    models = [BuyTillYouDie(Kind.AMOUNT, 14, rows) for _ in range(2)]
    for model in models:
        model.fit(rows, np.zeros(500))
    assert models[0].to_dict() == models[1].to_dict()


def test_it_is_fitted_on_all_buyers_and_not_on_those_of_late() -> None:
    """Those who have left are in nobody's last weeks, and yet they tell how fast one leaves."""
    random = np.random.default_rng(5)
    truth = BgNbd(r=1.0, alpha=20.0, a=1.0, b=4.0)
    age = random.uniform(100, 400, 4000)
    x, recency, later = simulate(random, truth, age, 28.0)
    everybody = histories(x + 1, recency, age)
    of_late = age - recency <= 28
    label = (later > 0).astype(float)
    model = BuyTillYouDie(Kind.BINARY, 28, everybody)
    model.fit(everybody[of_late], label[of_late])
    biased = BuyTillYouDie(Kind.BINARY, 28, everybody[of_late])
    biased.fit(everybody[of_late], label[of_late])
    assert model.counts.a / (model.counts.a + model.counts.b) == pytest.approx(0.2, abs=0.05)
    off, biased_off = (
        abs((m.predict(everybody[of_late]) - label[of_late]).mean()) for m in (model, biased)
    )
    assert off < 0.03 < biased_off
