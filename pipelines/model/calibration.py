"""Makes probabilities and amounts of the calibration cut agree with what happened there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Objective

_CLIP: Final = 1e-6
_MOST_SHIFT: Final = 32.0  # of log odds
_LEAST_SLOPE: Final = 0.05  # of log odds
_MOST_STEPS: Final = 100  # of Newton's method; the hardest of 1,500 random cases took 18
_CONVERGED: Final = 1e-9  # of a step
_ROUNDING: Final = 1e-12  # of a sum over many rows
# What speaks against every correction, in rows, or in buyers as if all spent alike: a window is one
# draw of a shop's better and worse weeks, and the refit has learnt a part of it by itself. A slope
# or shift of the log odds is then .1 before anything is seen, give or take.
PRIOR_ROWS: Final = 100.0

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Corrections fitted on the calibration cut.

    Attributes:
        slope: for every event name, one slope of the log odds, above zero and shared by all
            horizons so that their order stays.
        shift: for every event name, one shift of the log odds per interval of the grid.
        factor: for every horizon of an amount (days as text), a factor.
    """

    slope: Mapping[str, float] = field(default_factory=dict)
    shift: Mapping[str, Sequence[float]] = field(default_factory=dict)
    factor: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "slope": dict(self.slope),
            "shift": {name: list(values) for name, values in self.shift.items()},
            "factor": dict(self.factor),
        }

    def probability(self, names: Sequence[str], happened: Doubles) -> Doubles:
        """Correct P(event until the end of each interval), (M, names, bins)."""
        own = [place for place, name in enumerate(names) if name in self.slope]
        if not own:
            return happened
        slope = np.array([self.slope[names[place]] for place in own])
        shift = np.array([self.shift[names[place]] for place in own])
        odds = slope[:, None] * log_odds(happened[:, own]) + shift
        result = happened.copy()
        # Two shifts may disagree by more than the predictions of near-certain users differ.
        result[:, own] = np.maximum.accumulate(sigmoid(odds), axis=2)
        return result

    def amount(self, days: int, expected: Doubles) -> Doubles:
        """Correct an expected amount."""
        return expected * self.factor.get(str(days), 1.0)


def fit_probability(
    happened: Doubles,
    label: NDArray[np.bool_],
    known: NDArray[np.bool_],
    *,
    ridge: float = PRIOR_ROWS,
) -> tuple[float, list[float]]:
    """Fit slope and shifts by penalised log loss (Platt 1999, slope shared by the horizons).

    Newton's method with backtracking (Armijo 1966): where many are far from what happened, a whole
    step goes too far, and the next one too far back.

    Args:
        happened: (M, bins), predicted.
        label: bool (M, bins), observed.
        known: bool (M, bins), whether the interval was closed; others do not count.
        ridge: pull towards slope 1 and shift 0, in pseudo-observations; it decides where the
            data do not, for example where everybody or nobody has the event.

    Returns:
        The slope (``_LEAST_SLOPE`` at least, so that nobody's order changes) and one shift per
        interval, the best for it.
    """
    x, y = log_odds(happened), label.astype(np.float64)
    free = np.ones(1 + happened.shape[1], dtype=np.bool_)
    begin = np.zeros(len(free))
    begin[0] = 1.0
    found = _descend(x, y, known, ridge, begin, free)
    if found[0] < _LEAST_SLOPE:
        found[0], free[0] = _LEAST_SLOPE, False
        found = _descend(x, y, known, ridge, found, free)
    return float(found[0]), [float(v) for v in found[1:]]


def _descend(
    x: Doubles,
    y: Doubles,
    known: NDArray[np.bool_],
    ridge: float,
    begin: Doubles,
    free: NDArray[np.bool_],
) -> Doubles:
    """Minimise the penalised log loss over those of (slope, shifts) that are free."""
    prior = np.zeros(len(begin))
    prior[0] = 1.0

    def lose(at: Doubles) -> float:
        odds = at[0] * x + at[1:]
        loss = np.where(known, np.logaddexp(0.0, odds) - y * odds, 0.0).sum()
        return float(loss + ridge / 2 * np.square(at - prior).sum())

    at, loss = begin, lose(begin)
    for _ in range(_MOST_STEPS):
        p = sigmoid(at[0] * x + at[1:])
        error, weight = (p - y) * known, p * (1 - p) * known
        gradient = np.concatenate([[(error * x).sum()], error.sum(axis=0)]) + ridge * (at - prior)
        hessian = np.diag(np.concatenate([[(weight * x * x).sum()], weight.sum(axis=0)]) + ridge)
        hessian[0, 1:] = hessian[1:, 0] = (weight * x).sum(axis=0)
        step = np.zeros(len(at))
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        noise = _ROUNDING * (1.0 + abs(loss))
        part = 1.0
        while (after := lose(at - part * step)) > loss - 1e-4 * part * (gradient @ step) + noise:
            part /= 2
        at, loss = at - part * step, after
        if float(np.abs(step).max()) < _CONVERGED:
            break
    return at


def fit_level(happened: Doubles, wanted: Doubles, slope: float) -> list[float]:
    """Return the shift per interval that brings mean predictions to those wanted.

    Args:
        happened: (M, bins), predicted, of at least one row.
        wanted: (bins,), means, growing with the interval.
        slope: of the log odds.
    """
    shift = []
    before = np.zeros(len(happened))
    for odds, mean in zip(slope * log_odds(happened).T, wanted, strict=True):
        low, high = -_MOST_SHIFT, _MOST_SHIFT
        while high - low > _CLIP:
            middle = (low + high) / 2
            # As ``Calibration.probability`` does: never less than until the interval before.
            if np.maximum(before, sigmoid(odds + middle)).mean() < mean:
                low = middle
            else:
                high = middle
        shift.append((low + high) / 2)
        before = np.maximum(before, sigmoid(odds + shift[-1]))
    return shift


def fit_factor(actual: Doubles, expected: Doubles) -> float:
    """Return what puts a total right, as far as the amounts can tell.

    A few buyers of a great deal tell little of the others: there are as many buyers as would
    scatter as much if all spent alike (Kish, "Survey sampling", 1965).

    Args:
        actual: (M,), amounts.
        expected: (M,), of the same.

    Returns:
        Actual over expected total to a power from 0 (nobody bought) to 1; 1 where nothing is
        expected.
    """
    total = float(actual.sum())
    if total <= 0 or expected.sum() <= 0:
        return 1.0
    buyers = total**2 / float(np.square(actual).sum())
    return float((total / expected.sum()) ** (buyers / (buyers + PRIOR_ROWS)))


def choose_threshold(probability: Doubles, label: NDArray[np.bool_], objective: Objective) -> float:
    """Return the probability from which on a positive is called, best on the data given.

    The value lies half-way between the two neighbouring predictions, or between the last and 0
    where all are called, so that rounding does not move a user across it. 0.5 where the labels are
    all alike.

    Args:
        probability: (N,), predicted.
        label: bool (N,), observed.
        objective: f1; youden (recall minus false positive rate; Youden, Cancer 3, 1950); or
            break_even (precision = recall: as many calls as positives).
    """
    positives = int(label.sum())
    if positives == 0 or positives == len(label):
        return 0.5
    order = np.argsort(-probability, kind="stable")
    sorted_p = probability[order]
    hits = np.cumsum(label[order])
    called = np.arange(1, len(label) + 1)
    if objective == "f1":
        score = 2 * hits / (called + positives)
    elif objective == "break_even":
        score = -np.abs(called - positives).astype(np.float64)
    else:
        score = hits / positives - (called - hits) / (len(label) - positives)
    # A tie belongs together: only the last of equal predictions may end the call.
    score = np.where(np.append(sorted_p[1:] != sorted_p[:-1], True), score, -np.inf)
    best = int(np.argmax(score))
    following = sorted_p[best + 1] if best + 1 < len(label) else 0.0
    return float((sorted_p[best] + following) / 2)


def log_odds(p: Doubles) -> Doubles:
    """Return log(p / (1 - p)), p kept a little away from both ends."""
    p = np.clip(p, _CLIP, 1 - _CLIP)
    return np.asarray(np.log(p) - np.log1p(-p))


def sigmoid(x: Doubles) -> Doubles:
    """Return the probability of log odds."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40, 40))))
