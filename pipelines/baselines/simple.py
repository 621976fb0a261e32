"""Majority and recency: the rules that a model must beat to be worth its keep."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression

from pipelines.features.snapshot_table import Floats


class Majority:
    """Everybody gets the mean of the past."""

    def __init__(self) -> None:
        self.mean = 0.0

    def fit(self, x: Floats, y: Floats) -> None:
        """Take the mean label."""
        self.mean = float(y.mean())

    def predict(self, x: Floats) -> Floats:
        """Return it for every row."""
        return np.full(len(x), self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        return {"mean": self.mean}


class Recency:
    """The rate as a monotone function of the days since the event in question last happened.

    Isotonic regression (Barlow et al., "Statistical Inference under Order Restrictions", 1972);
    users without such an event get their own rate.
    """

    def __init__(self, column: int) -> None:
        self.column = column
        self.never = 0.0
        self._curve = IsotonicRegression(increasing="auto", out_of_bounds="clip")
        self._has_curve = False

    def fit(self, x: Floats, y: Floats) -> None:
        """Fit the curve and the rate of those without the event."""
        days = x[:, self.column]
        known = np.isfinite(days)
        self.never = float(y[~known].mean()) if (~known).any() else float(y.mean())
        self._has_curve = bool(known.any())
        if self._has_curve:
            with warnings.catch_warnings():
                # A direction that the data leave open costs little either way.
                warnings.filterwarnings("ignore", message="Confidence interval of the Spearman")
                self._curve.fit(days[known], y[known])

    def predict(self, x: Floats) -> Floats:
        """Read the curve."""
        days = x[:, self.column]
        known = np.isfinite(days)
        values = np.full(len(x), self.never)
        if self._has_curve:
            values[known] = self._curve.predict(days[known])
        return values

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        if not self._has_curve:
            return {"never": self.never, "days": [], "rate": []}
        return {
            "never": self.never,
            "days": self._curve.X_thresholds_.tolist(),
            "rate": self._curve.y_thresholds_.tolist(),
        }
