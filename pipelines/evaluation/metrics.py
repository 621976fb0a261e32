"""Metrics on weighted rows, so that a bootstrap sample is a weighting and nothing is re-sorted.

Every function takes weights (B, N): a row per bootstrap sample, row 0 all ones for the value
itself; and returns (B,) values, NaN where a sample leaves the metric undefined (one class only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ECE_BINS: Final = 10
LIFT_SHARE: Final = 0.1
# Bootstrap samples that are looked at together: what is made of them stays in the cores' caches,
# which takes half the time of all at once.
_BLOCK: Final = 16
# A probability of exactly 0 or 1 that is wrong has infinite loss; this is the least claimed.
_EPSILON: Final = 1e-7

# Chance only ever adds to these, and more in a bootstrap sample than in the rows themselves: the
# interval of the samples may lie above the value, and is not told.
BIASED: Final = frozenset({"ece"})

HIGHER_IS_BETTER: Final[dict[str, bool]] = {
    "roc_auc": True,
    "pr_auc": True,
    "log_loss": False,
    "brier": False,
    "ece": False,
    "accuracy": True,
    "precision": True,
    "recall": True,
    "f1": True,
    "lift_at_10pct": True,
    "mae": False,
    "gini": True,
    "top_decile_capture": True,
    "total_ratio": True,
}


def draw_weights(users: NDArray[np.int32], *, samples: int, seed: int) -> Floats:
    """Draw bootstrap weights of rows by resampling users.

    All rows of a user share a weight, so that several cuts of one user are not taken for
    independent (cluster bootstrap: Field & Welsh, JRSS B 69, 2007).

    Args:
        users: (N,) user of each row.
        samples: number of bootstrap samples.
        seed: of the draw; the same seed gives paired samples.

    Returns:
        (samples + 1, N); row 0 is all ones.
    """
    ids, index = np.unique(users, return_inverse=True)
    random = np.random.default_rng(seed)
    counts = random.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=samples)
    weights = np.ones((samples + 1, len(users)))
    weights[1:] = counts[:, index]
    return weights


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Weighted cumulative sums of rows in groups of equal score, best first.

    Attributes:
        rows: (B, G) weight of the groups up to and including each.
        gain: (B, G) the same, times the outcome.
    """

    rows: Floats
    gain: Floats


@dataclass(frozen=True, kw_only=True)
class _Order:
    """Rows in the order of their score, best first.

    Attributes:
        rows: (N,) which.
        outcome: (N,) of each, 0/1 or an amount.
        last: (G,) positions that end a group of equal scores.
    """

    rows: NDArray[np.int64]
    outcome: Floats
    last: NDArray[np.int64]

    @classmethod
    def by(cls, score: Floats, outcome: Floats) -> _Order:
        rows = np.argsort(-score, kind="stable")
        last = np.flatnonzero(np.append(np.diff(score[rows]) != 0, True))
        return cls(rows=rows, outcome=outcome[rows], last=last)

    def rank(self, weights: Floats) -> Ranking:
        """Sum up (B, N) weights."""
        ordered = np.take(weights, self.rows, axis=1)
        rows = np.cumsum(ordered, axis=1)
        gain = np.cumsum(np.multiply(ordered, self.outcome, out=ordered), axis=1)
        if len(self.last) < len(self.rows):
            rows, gain = rows[:, self.last], gain[:, self.last]
        return Ranking(rows=rows, gain=gain)


def rank_rows(outcome: Floats, score: Floats, weights: Floats) -> Ranking:
    """Sort rows by score, best first; ties form one group.

    Args:
        outcome: (N,) 0/1 or amounts.
        score: (N,).
        weights: (B, N).
    """
    return _Order.by(score, outcome).rank(weights)


def _area(x: Floats, y: Floats) -> Floats:
    """(B,) area under the line from the origin through (B, G) cumulative sums."""
    steps, heights = x[:, 1:] - x[:, :-1], y[:, 1:] + y[:, :-1]
    area: Floats = 0.5 * (np.einsum("bg,bg->b", steps, heights) + x[:, 0] * y[:, 0])
    return area


def _divide(a: Floats, b: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Floats = np.where(b > 0, a / b, np.nan)
    return quotient


def roc_auc(ranking: Ranking) -> Floats:
    """Area under the ROC curve, ties counted half (Mann & Whitney, 1947)."""
    positives = ranking.gain
    negatives = ranking.rows - positives
    return _divide(_area(negatives, positives), positives[:, -1] * negatives[:, -1])


def pr_auc(ranking: Ranking) -> Floats:
    """Average precision: the precision at each threshold, weighted by the recall gained."""
    positives, rows = ranking.gain, ranking.rows
    # A sample may lack the best rows: precision of nobody is not looked at.
    precision = np.divide(positives, rows, out=np.zeros_like(rows), where=rows > 0)
    steps = positives[:, 1:] - positives[:, :-1]
    area = np.einsum("bg,bg->b", steps, precision[:, 1:]) + positives[:, 0] * precision[:, 0]
    return _divide(area, positives[:, -1])


def _read_gain(ranking: Ranking, share: float) -> Floats:
    """(B,) gain where ``share`` of the rows are above, linear within a group."""
    wanted = share * ranking.rows[:, -1]
    column = np.count_nonzero(ranking.rows < wanted[:, None], axis=1)
    sample = np.arange(len(wanted))
    rows, gain = ranking.rows[sample, column], ranking.gain[sample, column]
    before = np.maximum(column - 1, 0)
    is_first = column == 0
    rows_before = np.where(is_first, 0.0, ranking.rows[sample, before])
    gain_before = np.where(is_first, 0.0, ranking.gain[sample, before])
    read: Floats = gain_before + (gain - gain_before) * (wanted - rows_before) / (
        rows - rows_before
    )
    return read


def lift(ranking: Ranking, share: float = LIFT_SHARE) -> Floats:
    """Rate of outcomes among the best-scored share, over the rate among all."""
    return _divide(_read_gain(ranking, share), ranking.gain[:, -1]) / share


def binary_metrics(y: Floats, p: Floats, weights: Floats, *, threshold: float) -> dict[str, Floats]:
    """All metrics of a binary target.

    Args:
        y: (N,) 0/1.
        p: (N,) probabilities.
        weights: (B, N).
        threshold: at or above it a row counts as predicted positive.

    Returns:
        Metric name -> (B,).
    """
    safe = np.clip(p, _EPSILON, 1 - _EPSILON)
    called = (p >= threshold).astype(float)
    columns = [
        np.ones_like(p),
        y,
        called,
        called * y,
        called == (y > 0),
        -(y * np.log(safe) + (1 - y) * np.log1p(-safe)),
        (p - y) ** 2,
    ]
    total, positives, calls, hits, right, loss, squares = (weights @ np.column_stack(columns)).T
    precision, recall = _divide(hits, calls), _divide(hits, positives)
    order = _Order.by(p, y)
    ranked = _in_blocks(lambda block: _rank_binary(order.rank(block)), weights)
    return {
        "roc_auc": ranked["roc_auc"],
        "pr_auc": ranked["pr_auc"],
        "log_loss": loss / total,
        "brier": squares / total,
        "ece": calibration_error(y, p, weights),
        "accuracy": right / total,
        # Calling nobody is right about nobody: precision 0 keeps the row comparable.
        "precision": np.nan_to_num(precision),
        "recall": recall,
        "f1": _divide(2 * hits, calls + positives),
        "lift_at_10pct": ranked["lift"],
    }


def _rank_binary(ranking: Ranking) -> dict[str, Floats]:
    return {"roc_auc": roc_auc(ranking), "pr_auc": pr_auc(ranking), "lift": lift(ranking)}


def _in_blocks(
    measure: Callable[[Floats], dict[str, Floats]], weights: Floats
) -> dict[str, Floats]:
    found = [measure(weights[i : i + _BLOCK]) for i in range(0, len(weights), _BLOCK)]
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def calibration_error(y: Floats, p: Floats, weights: Floats, bins: int = ECE_BINS) -> Floats:
    """Expected calibration error over bins of equal size.

    The bins are those of the whole sample (Naeini et al., AAAI 2015, with quantile bins), equal
    scores share a bin.
    """
    gaps = np.abs(weights @ (_bin_rows(p, bins) * (p - y)[:, None]))
    error: Floats = gaps.sum(axis=1) / weights.sum(axis=1)
    return error


def chance_of_calibration_error(
    p: Floats, *, samples: int, confidence: float, seed: int, bins: int = ECE_BINS
) -> dict[str, float | None]:
    """What ``calibration_error`` is where every probability is exactly right.

    It is not zero: of N rows a share of outcomes is off by chance. Outcomes are drawn from the
    probabilities themselves (consistency resampling: Bröcker & Smith, Weather and Forecasting 22,
    2007), each row by itself.

    Args:
        p: (N,) probabilities.
        samples: number of draws.
        confidence: that an exact model stays at or below ``high``.
        seed: of the draws.

    Returns:
        ``mean`` of the draws, and ``high``, their quantile.
    """
    random = np.random.default_rng(seed)
    member = _bin_rows(p, bins)
    gaps = np.empty(samples)
    for i in range(samples):
        gaps[i] = np.abs((p - (random.random(len(p)) < p)) @ member).sum() / len(p)
    return {"mean": clean(gaps.mean()), "high": clean(np.quantile(gaps, confidence))}


def _bin_rows(p: Floats, bins: int) -> Floats:
    """(N, bins) one where a row is in a bin; fewer bins where scores are equal."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.asarray(np.eye(len(edges) + 1)[np.searchsorted(edges, p, side="right")])


def best_gini(y: Floats, weights: Floats) -> Floats:
    """(B,) Gini coefficient of the true order: the most that a prediction can have."""
    order = _Order.by(y, y)
    return _in_blocks(lambda block: {"gini": _gini(order.rank(block))}, weights)["gini"]


def amount_metrics(
    y: Floats, p: Floats, weights: Floats, best: Floats | None = None
) -> dict[str, Floats]:
    """All metrics of an amount.

    gini is the normalised Gini coefficient: the area between the capture curve of the predicted
    order and the diagonal, over that of the true order (Frees, Meyers & Cummings, JASA 106,
    2011). top_decile_capture is the share of all spend made by the best-scored tenth.
    total_ratio is predicted over actual total.

    Args:
        y: (N,) amounts.
        p: (N,) predicted.
        weights: (B, N).
        best: of ``best_gini``, which is the same for all predictions; None = found here.

    Returns:
        Metric name -> (B,).
    """
    total, actual, predicted, errors = (
        weights @ np.column_stack([np.ones_like(y), y, p, np.abs(p - y)])
    ).T
    order = _Order.by(p, y)
    ranked = _in_blocks(lambda block: _rank_amounts(order.rank(block)), weights)
    return {
        "mae": errors / total,
        "gini": _divide(ranked["gini"], best_gini(y, weights) if best is None else best),
        "top_decile_capture": _divide(ranked["captured"], actual),
        "total_ratio": _divide(predicted, actual),
    }


def _rank_amounts(ranking: Ranking) -> dict[str, Floats]:
    return {"gini": _gini(ranking), "captured": _read_gain(ranking, LIFT_SHARE)}


def _gini(ranking: Ranking) -> Floats:
    """(B,) area between the capture curve and the diagonal."""
    rows, gain = ranking.rows, ranking.gain
    return _divide(_area(rows, gain), rows[:, -1] * gain[:, -1]) - 0.5


def summarise(values: Floats, confidence: float) -> dict[str, float | None]:
    """Value and percentile interval of a metric's (B,) samples; None where undefined."""
    low, high = interval(values[1:], confidence)
    return {"value": clean(values[0]), "low": low, "high": high}


def summarise_all(
    samples: dict[str, Floats], confidence: float
) -> dict[str, dict[str, float | None]]:
    """Value and interval of several metrics; those that chance adds to have a value alone."""
    told = {metric: summarise(values, confidence) for metric, values in samples.items()}
    return told | {m: told[m] | {"low": None, "high": None} for m in BIASED & told.keys()}


def interval(samples: Floats, confidence: float) -> tuple[float | None, float | None]:
    """Percentile interval (Efron & Tibshirani, 1993); undefined samples are left out."""
    known = samples[np.isfinite(samples)]
    if not len(known):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return clean(low), clean(high)


def clean(value: float) -> float | None:
    """A JSON number: rounded well below any meaning, None where undefined."""
    return round(float(value), 6) if np.isfinite(value) else None
