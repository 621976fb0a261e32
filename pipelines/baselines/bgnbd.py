"""BG/NBD and Gamma-Gamma: the marketing science classic for purchases and spend.

- BG/NBD: Fader, Hardie & Lee, "'Counting Your Customers' the Easy Way: An Alternative to the
  Pareto/NBD Model", Marketing Science 24(2), 2005. A buyer purchases at a rate of their own
  (gamma: r, alpha) and after each purchase leaves for good with a probability of their own
  (beta: a, b).
- Gamma-Gamma: Fader & Hardie, "The Gamma-Gamma Model of Monetary Value", 2013. Amounts vary
  around a mean of the buyer's own, which varies between buyers (p, q, gamma), whatever their rate.

Written here, as of the libraries lifetimes rests, btyd needs NumPy 1, PyMC-Marketing brings a
compiler, and none that is light tells the probability of a purchase.

A transaction is a day with a purchase. Time is in days. Both are fitted on everybody who has ever
bought: among those alone who were seen of late, whom other baselines learn from, nobody seems to
have left.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln, digamma, gammaln, hyp2f1

from pipelines.baselines.histories import AGE, AMOUNT, DAYS, SPAN
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import Floats

# Logs of parameters stay within this, where every function below is finite.
_BOUND: Final = 9.0
# Holds parameters on which the data say nothing: a weak normal prior of their logs around 0.
_PRIOR: Final = 1e-5
# Nodes and weights of an integral over [-1, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class BgNbd:
    """Rate and dropout of buyers.

    Inputs: x (R,) repeat purchases, recency (R,) days from the first to the last purchase, and
    age (R,) days since the first purchase; 0 <= recency <= age.
    """

    def __init__(self, r: float = 1.0, alpha: float = 1.0, a: float = 1.0, b: float = 1.0) -> None:
        self.r, self.alpha, self.a, self.b = r, alpha, a, b

    def fit(self, x: Floats, recency: Floats, age: Floats) -> None:
        """Maximise the likelihood; without rows nothing changes."""
        if len(x) == 0:
            return
        # Time in units of the mean age brings all parameters to one size.
        unit = float(age.mean()) or 1.0
        rows, counts = np.unique(
            np.column_stack([x, recency / unit, age / unit]), axis=0, return_counts=True
        )
        share = counts / counts.sum()

        def loss(logs: Floats) -> tuple[float, Floats]:
            value, gradient = log_likelihood(np.exp(logs), *rows.T)
            total = -float(share @ value) + _PRIOR * float(logs @ logs)
            return total, -(gradient @ share) * np.exp(logs) + 2 * _PRIOR * logs

        found = minimise(loss, 4)
        self.r, self.alpha, self.a, self.b = (float(v) for v in np.exp(found))
        self.alpha *= unit

    def alive(self, x: Floats, recency: Floats, age: Floats) -> Floats:
        """(R,) probabilities that the buyer has not left (Fader, Hardie & Lee 2008, note)."""
        shape = self.r + x
        odds = np.log(self.a) - np.log(np.maximum(self.b + x - 1, 1e-12))
        odds += shape * np.log((self.alpha + age) / (self.alpha + recency))
        # Nobody leaves before a repeat purchase.
        probability: Floats = np.where(x > 0, 1 / (1 + np.exp(np.minimum(odds, 700))), 1.0)
        return probability

    def probability(self, x: Floats, recency: Floats, age: Floats, days: float) -> Floats:
        """(R,) probabilities of at least one purchase in (age, age + days].

        Whoever is alive leaves at a purchase at the earliest, so that the next one comes at the
        buyer's rate, whose posterior is gamma(r + x, alpha + age).
        """
        silent = np.log((self.alpha + age) / (self.alpha + age + days)) * (self.r + x)
        return self.alive(x, recency, age) * -np.expm1(silent)

    def expected(self, x: Floats, recency: Floats, age: Floats, days: float) -> Floats:
        """(R,) expected numbers of purchases in (age, age + days].

        Equation 10 of the paper has a pole at a = 1 and, for x = 0, cancels badly around it. Its
        derivative by time, s / (alpha + age) * 2F1(s + 1, a; a + b + x; -t / (alpha + age)) with
        s = r + x, is smooth and positive everywhere, and is integrated over log time.
        """
        shape = (self.r + x)[:, None]
        left = (self.b + x)[:, None]
        w = np.log1p(days / (self.alpha + age))[:, None]
        at = w * (_NODES + 1) / 2
        # By Pfaff's transformation all terms of the series are positive.
        rate = np.exp(-shape * at) * hyp2f1(shape + 1, left, self.a + left, -np.expm1(-at))
        expected: Floats = self.alive(x, recency, age) * ((shape * w / 2 * rate) @ _WEIGHTS)
        return expected

    def to_dict(self) -> dict[str, float]:
        """Parameters as JSON values."""
        return {"r": self.r, "alpha": self.alpha, "a": self.a, "b": self.b}


def log_likelihood(
    parameters: Floats, x: Floats, recency: Floats, age: Floats
) -> tuple[Floats, Floats]:
    """Log-likelihood of BG/NBD and its gradient.

    Args:
        parameters: (4,) r, alpha, a, b.
        x: (R,) repeat purchases.
        recency: (R,) time of the last one, from the first purchase.
        age: (R,) time since the first purchase.

    Returns:
        (R,) values, (4, R) derivatives by the parameters.
    """
    r, alpha, a, b = parameters
    shape = r + x
    repeat = x > 0
    common = gammaln(shape) - gammaln(r) + r * np.log(alpha) + betaln(a, b + x) - betaln(a, b)
    stayed = -shape * np.log(alpha + age)
    # B(a + 1, b + x - 1) = B(a, b + x) a / (b + x - 1)
    others = np.where(repeat, b + x - 1, 1.0)
    left = np.where(repeat, np.log(a) - np.log(others) - shape * np.log(alpha + recency), -np.inf)
    either = np.logaddexp(stayed, left)
    gone = np.exp(left - either)
    by_r = digamma(shape) - digamma(r) + np.log(alpha)
    by_r = by_r - (1 - gone) * np.log(alpha + age) - gone * np.log(alpha + recency)
    by_alpha = r / alpha - shape * ((1 - gone) / (alpha + age) + gone / (alpha + recency))
    total = digamma(a + b) - digamma(a + b + x)
    by_a = total + gone / a
    by_b = total + digamma(b + x) - digamma(b) - gone / others
    return common + either, np.stack([by_r, by_alpha, by_a, by_b])


class GammaGamma:
    """Mean amount of a purchase, shrunk to the population.

    Inputs: n (R,) purchases, mean (R,) amount of one.
    """

    def __init__(self, p: float = 1.0, q: float = 2.0, gamma: float = 0.0) -> None:
        self.p, self.q, self.gamma = p, q, gamma

    def fit(self, n: Floats, mean: Floats) -> None:
        """Maximise the likelihood; rows without an amount say nothing."""
        paid = (n > 0) & (mean > 0)
        if not paid.any():
            return
        n, mean = n[paid], mean[paid]
        unit = float(mean.mean())
        amount = mean / unit
        # There are few different numbers, whose special functions are worth sharing.
        numbers, at = np.unique(n, return_inverse=True)
        share = np.bincount(at) / len(n)
        log_total = np.log(n * amount)
        constant = float(np.log(amount).mean())

        def loss(logs: Floats) -> tuple[float, Floats]:
            # Below q = 1 the population has no mean.
            p, above, gamma = np.exp(logs)
            q = 1 + above
            shape, log_top = p * numbers, np.log(gamma + n * amount)
            ahead = log_total - log_top
            value = share @ (gammaln(shape + q) - gammaln(shape)) + (p * n * ahead).mean()
            value += q * (np.log(gamma) - log_top.mean()) - gammaln(q) - constant
            both = digamma(shape + q)
            by_p = share @ (numbers * (both - digamma(shape))) + (n * ahead).mean()
            by_q = share @ both - digamma(q) + np.log(gamma) - log_top.mean()
            by_gamma = q / gamma - ((p * n + q) * np.exp(-log_top)).mean()
            gradient = np.array([by_p * p, by_q * above, by_gamma * gamma])
            return -float(value) + _PRIOR * float(logs @ logs), -gradient + 2 * _PRIOR * logs

        p, above, gamma = np.exp(minimise(loss, 3))
        self.p, self.q, self.gamma = float(p), 1 + float(above), float(gamma) * unit

    def expected(self, n: Floats, mean: Floats) -> Floats:
        """(R,) expected amounts of a purchase (equation 5 of the note); n may be 0."""
        amounts: Floats = self.p * (self.gamma + n * mean) / (self.p * n + self.q - 1)
        return amounts

    def to_dict(self) -> dict[str, float]:
        """Parameters as JSON values."""
        return {"p": self.p, "q": self.q, "gamma": self.gamma}


class BuyTillYouDie:
    """BG/NBD for whether one buys, times Gamma-Gamma for how much one spends.

    It learns from histories alone; labels tell only the rate of those who never bought, on whom
    the model is silent.

    Args:
        kind: whether or how much.
        horizon_days: within how many days.
        everybody: (U, 5) histories of purchases of all users, as of the fit.
    """

    def __init__(self, kind: Kind, horizon_days: int, everybody: Floats) -> None:
        self.kind = kind
        self.horizon_days = horizon_days
        self.buyers = everybody[everybody[:, DAYS] > 0]
        self.never = 0.0
        self.counts = BgNbd()
        self.amounts = GammaGamma()

    def fit(self, x: Floats, y: Floats) -> None:
        """Fit on all buyers, and on (R, 5) histories of purchases and (R,) labels."""
        bought = x[:, DAYS] > 0
        self.never = float((y if bought.all() else y[~bought]).mean())
        self.counts.fit(*_describe(self.buyers))
        if self.kind is Kind.AMOUNT:
            self.amounts.fit(*average(self.buyers))

    def predict(self, x: Floats) -> Floats:
        """(R,) probabilities of a purchase, or expected amounts."""
        values = np.full(len(x), self.never)
        bought = x[:, DAYS] > 0
        rows, back = np.unique(x[bought][:, [DAYS, SPAN, AGE]], axis=0, return_inverse=True)
        known = (rows[:, 0] - 1, rows[:, 1], rows[:, 2])
        if self.kind is Kind.BINARY:
            values[bought] = self.counts.probability(*known, self.horizon_days)[back]
        else:
            counts = self.counts.expected(*known, self.horizon_days)[back]
            values[bought] = counts * self.amounts.expected(*average(x[bought]))
        return values

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        parameters: dict[str, Any] = {"never": self.never, "bg_nbd": self.counts.to_dict()}
        if self.kind is Kind.AMOUNT:
            parameters["gamma_gamma"] = self.amounts.to_dict()
        return parameters


def average(x: Floats) -> tuple[Floats, Floats]:
    """(R,) days with a purchase and (R,) mean amount of one, from (R, 5) histories."""
    return x[:, DAYS], x[:, AMOUNT] / np.maximum(x[:, DAYS], 1)


def minimise(loss: Any, size: int) -> NDArray[np.float64]:
    """Minimise a function of logs of parameters that returns its value and gradient."""
    found = minimize(
        loss,
        np.zeros(size),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-_BOUND, _BOUND)] * size,
        options={"maxiter": 500},
    )
    logs: NDArray[np.float64] = found.x
    return logs


def _describe(x: Floats) -> tuple[Floats, Floats, Floats]:
    return x[:, DAYS] - 1, x[:, SPAN], x[:, AGE]
