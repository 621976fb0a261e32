"""The user's own past rate, shrunk to the population."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.baselines.bgnbd import GammaGamma, average, minimise
from pipelines.baselines.histories import DAYS, OBSERVED
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats

_PRIOR = 1e-6
_TINY = 1e-12


class Density:
    """Days with the event are Poisson at a rate that is gamma(a, b) between users.

    After n such days in T, the posterior rate is gamma(a + n, b + T), and a horizon of H days
    stays silent with probability ((b + T) / (b + T + H)) ** (a + n): the negative binomial
    (Greenwood & Yule, Journal of the Royal Statistical Society 83, 1920; Ehrenberg,
    "Repeat-Buying", 1972). a and b maximise the likelihood of the labels, so that they also
    absorb that the population is chosen by recent activity. Amounts: the expected number of days
    with a purchase times the shrunk mean amount of one (Gamma-Gamma).
    """

    def __init__(self, target: Target) -> None:
        self.kind = target.kind
        self.horizon_days = float(target.horizon_days)
        self.silence = target.kind is Kind.BINARY and target.event is None
        self.a = 1.0
        self.b = 1.0
        self.amounts = GammaGamma()

    def fit(self, x: Floats, y: Floats) -> None:
        """Fit on (R, 5) histories of the event and (R,) labels."""
        happened = (y > 0) != self.silence
        # Rows that are alike count once, with their number.
        rows, counts = np.unique(
            np.column_stack([self._count(x), x[:, OBSERVED], happened]),
            axis=0,
            return_counts=True,
        )
        n, observed, event = rows[:, 0], rows[:, 1] / self.horizon_days, rows[:, 2] > 0
        share = counts / counts.sum()

        def loss(logs: Floats) -> tuple[float, Floats]:
            a, b = np.exp(logs)
            since = np.log1p(1 / (b + observed))
            hazard = np.maximum((a + n) * since, _TINY)
            value = np.where(event, np.log(-np.expm1(-hazard)), -hazard)
            slope = np.where(event, 1 / np.expm1(np.minimum(hazard, 700)), -1.0) * share
            by_a = float(slope @ since)
            by_b = -float(slope @ ((a + n) / ((b + observed) * (b + observed + 1))))
            return (
                -float(share @ value) + _PRIOR * float(logs @ logs),
                -np.array([by_a * a, by_b * b]) + 2 * _PRIOR * logs,
            )

        a, b = np.exp(minimise(loss, 2))
        self.a, self.b = float(a), float(b) * self.horizon_days
        if self.kind is Kind.AMOUNT:
            self.amounts.fit(*average(x))

    def predict(self, x: Floats) -> Floats:
        """(R,) probabilities or expected amounts."""
        shape, rate = self.a + self._count(x), self.b + x[:, OBSERVED]
        if self.kind is Kind.AMOUNT:
            amounts: Floats = self.horizon_days * shape / rate
            return amounts * self.amounts.expected(*average(x))
        silent = -shape * np.log1p(self.horizon_days / rate)
        values: Floats = np.exp(silent) if self.silence else -np.expm1(silent)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        parameters: dict[str, Any] = {"a": self.a, "b_days": self.b}
        if self.kind is Kind.AMOUNT:
            parameters["gamma_gamma"] = self.amounts.to_dict()
        return parameters

    def _count(self, x: Floats) -> Floats:
        """(R,) days with the event; a user's first day of all is certain, so tells no rate."""
        days: Floats = x[:, DAYS]
        return np.maximum(days - 1, 0) if self.silence else days
