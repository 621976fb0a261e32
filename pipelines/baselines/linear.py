"""Logistic regression for binary targets, a log-linear model for amounts."""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.linalg import LinAlgWarning
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, PoissonRegressor

from pipelines.features.cuts import Split
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import Floats, Mask, SnapshotTable

# scikit-learn's Newton solver turns a warning into an error while it solves, for the whole process.
_ONE_AT_A_TIME: Final = threading.Lock()

_C: Final = 0.1  # the inverse of the penalty on coefficients, of a sum of log losses
_ALPHA: Final = 0.05  # the penalty, of a mean deviance
_ENOUGH: Final = 16384  # rows
_REST: Final = 0.005  # of log odds, or of the logarithm of an amount
_LEAST_SPREAD: Final = 1e-9
_ROWS: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How F features become columns of a linear model.

    Attributes:
        mean, scale: (F,), of their log1p, each with its own sign, where they are known.
        gaps: (F,), which get a column that says whether they are missing.
    """

    mean: Floats
    scale: Floats
    gaps: Mask

    @classmethod
    def of(cls, x: Floats) -> Scaling:
        """Scale by (R, F) features."""
        columns = x.shape[1]
        mean, scale, gaps = np.zeros(columns), np.ones(columns), np.zeros(columns, dtype=bool)
        for place, column in enumerate(x.T):
            known = np.isfinite(column)
            gaps[place] = not known.all()
            squashed = _squash(column[known])
            if len(squashed):
                mean[place] = squashed.mean()
                spread = squashed.std()
                scale[place] = spread if spread > _LEAST_SPREAD else 1.0
        return cls(mean=mean, scale=scale, gaps=gaps)

    def apply(self, x: Floats) -> Floats:
        """Return (R, F + columns of what is missing)."""
        rows, columns = x.shape
        result = np.empty((rows, columns + int(self.gaps.sum())))
        # Some at a time: each step on the way would be as large as the table.
        for low in range(0, rows, _ROWS):
            some = x[low : low + _ROWS]
            scaled = np.nan_to_num((_squash(some) - self.mean) / self.scale)
            into = result[low : low + _ROWS]
            # Beyond a few deviations a log-linear mean explodes: extremes count as far, not more.
            np.clip(scaled, -5, 5, out=into[:, :columns])
            into[:, columns:] = ~np.isfinite(some[:, self.gaps])
        return result

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        return {
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "missing_indicators": np.flatnonzero(self.gaps).tolist(),
        }


def scale(table: SnapshotTable) -> tuple[SnapshotTable, Scaling]:
    """Return the table with the columns of a linear model in place of its features.

    One scaling, of what closed by the calibration cut in the longest horizon, serves both fits of
    all targets.
    """
    longest = max(target.horizon_days for target in table.targets)
    scaling = Scaling.of(table.features[table.closed_rows(longest, Split.CALIBRATION)])
    return replace(table, features=scaling.apply(table.features)), scaling


class Linear:
    """A generalised linear model of standardised columns.

    Binary targets: logistic regression. Amounts: quasi-Poisson with a log link, whose totals
    match the data it is fitted on (McCullagh & Nelder, "Generalized Linear Models", 1989).
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.unit = 1.0
        self._model: Any = None

    def fit(self, x: Floats, y: Floats) -> None:
        """Fit the coefficients."""
        if self.kind is Kind.BINARY:
            if y.min() == y.max():  # a single class has no boundary
                self._model = None
                self.unit = float(y.mean())
                return
            self._model = LogisticRegression(C=_C, solver="newton-cholesky", max_iter=100)
            _fit(self._model, x, y > 0, alpha=1.0 / (_C * len(y)))
        else:
            self.unit = float(y.mean()) or 1.0
            self._model = PoissonRegressor(alpha=_ALPHA, solver="newton-cholesky", max_iter=100)
            _fit(self._model, x, y / self.unit, alpha=_ALPHA)

    def predict(self, x: Floats) -> Floats:
        """Predict probabilities or amounts."""
        if self._model is None:
            return np.full(len(x), self.unit)
        if self.kind is Kind.BINARY:
            probabilities: Floats = self._model.predict_proba(_narrow(x))[:, 1]
            return probabilities
        amounts: Floats = self._model.predict(_narrow(x)) * self.unit
        return amounts

    def to_dict(self) -> dict[str, Any]:
        """Parameters as JSON values."""
        fitted = self._model is not None
        return {
            "unit": self.unit,
            "coefficients": np.ravel(self._model.coef_).tolist() if fitted else [],
            "intercept": float(np.ravel(self._model.intercept_)[0]) if fitted else 0.0,
        }


def _fit(model: Any, x: Floats, y: Any, alpha: float) -> None:
    """Fit in single precision, or in double where that stops short of the optimum.

    Where the steps of Newton's method cannot be solved for in single precision, scikit-learn goes
    on with L-BFGS, which left probabilities off by up to .025. It says so by a warning, which other
    threads may swallow, and so what is left of the way is measured instead.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        # Nor is what single precision cannot hold, which leaves coefficients that are none.
        warnings.simplefilter("ignore", RuntimeWarning)
        with warnings.catch_warnings():
            # That L-BFGS stops short is measured next.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(_narrow(x), y)
        if not _measure_rest(model, x, y, alpha) <= _REST:
            model.fit(x, y)


def _measure_rest(model: Any, x: Floats, y: Any, alpha: float) -> float:
    """Return by how much one more Newton step would change what is linear in x, at most.

    Args:
        model: fitted, of the canonical link.
        x, y: (N, F) and (N,).
        alpha: half of it times the squared coefficients is added to the mean loss.
    """
    at = np.append(np.ravel(model.coef_), np.ravel(model.intercept_)).astype(np.float64)
    linear = x @ at[:-1] + at[-1]
    if isinstance(model, LogisticRegression):
        expected = expit(linear)
        weight = expected * (1.0 - expected)
    else:
        expected = weight = np.exp(linear)
    penalty = np.append(np.full(x.shape[1], alpha), 0.0)
    error = expected - y
    gradient = np.append(x.T @ error, error.sum()) / len(x) + penalty * at
    # The curvature need not be exact.
    some = slice(None, None, math.ceil(len(x) / _ENOUGH))
    columns = np.hstack([x[some], np.ones((len(x[some]), 1))])
    hessian = (columns.T * weight[some]) @ columns / len(columns) + np.diag(penalty)
    step = np.linalg.lstsq(hessian, gradient)[0]
    return float(np.abs(x @ step[:-1] + step[-1]).max())


def _narrow(x: Floats) -> Any:
    """Single precision is enough of numbers below five, and halves the time of a fit."""
    return x.astype(np.float32)


def _squash(x: Floats) -> Floats:
    squashed: Floats = np.sign(x) * np.log1p(np.abs(x))
    return squashed
