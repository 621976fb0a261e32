"""Curves of the models on the test cuts, for DVC plots and the report."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from pipelines.evaluation.comparison import TestRows
from pipelines.evaluation.metrics import Floats, rank_rows

POINTS: Final = 100
BINS: Final = 10
# The precision among fewer shoppers is chance: 0 or 1 of the first alone.
_CALLED: Final = 20

Rows = list[dict[str, Any]]


def roc_curve(part: TestRows) -> Rows:
    """False and true positive rates along the ranking, per model."""
    rows: Rows = []
    for model, p in part.predictions.items():
        ranking = rank_rows(part.y, p, np.ones((1, len(p))))
        hits, all_rows = ranking.gain[0], ranking.rows[0]
        negatives = all_rows - hits
        fpr = np.append(0, negatives / max(negatives[-1], 1))
        tpr = np.append(0, hits / max(hits[-1], 1))
        rows += _thin(part, model, false_positive_rate=fpr, true_positive_rate=tpr)
    return rows


def pr_curve(part: TestRows) -> Rows:
    """Precision against recall, per model."""
    rows: Rows = []
    for model, p in part.predictions.items():
        ranking = rank_rows(part.y, p, np.ones((1, len(p))))
        recall = ranking.gain[0] / max(ranking.gain[0, -1], 1)
        precision = ranking.gain[0] / ranking.rows[0]
        tells = ranking.rows[0] >= min(_CALLED, len(p))
        rows += _thin(part, model, recall=recall[tells], precision=precision[tells])
    return rows


def lift_curve(part: TestRows) -> Rows:
    """Lift against the share of users reached, per model."""
    rows: Rows = []
    shares = np.arange(1, POINTS + 1) / POINTS
    for model, p in part.predictions.items():
        ranking = rank_rows(part.y, p, np.ones((1, len(p))))
        reach = np.append(0, ranking.rows[0] / ranking.rows[0, -1])
        gain = np.append(0, ranking.gain[0] / max(ranking.gain[0, -1], 1e-12))
        captured = np.interp(shares, reach, gain)
        rows += _thin(part, model, share=shares, captured=captured, lift=captured / shares)
    return rows


def calibration_curve(part: TestRows) -> Rows:
    """Mean prediction and outcome in ten bins of equal size, per model."""
    rows: Rows = []
    for model, p in part.predictions.items():
        bins = np.array_split(np.argsort(p, kind="stable"), BINS)
        filled = [b for b in bins if len(b)]
        rows += [
            {
                "target": part.target.name,
                "model": model,
                "predicted": _round(p[b].mean()),
                "observed": _round(part.y[b].mean()),
                "rows": len(b),
            }
            for b in filled
        ]
    return rows


def confusion_rows(part: TestRows, model: str) -> Rows:
    """Actual and predicted class of every test row, as DVC's confusion template wants them."""
    called = part.predictions[model] >= part.thresholds[model]
    names = np.array(["no", "yes"])
    return [
        {"actual": a, "predicted": b}
        for a, b in zip(names[(part.y > 0).astype(int)], names[called.astype(int)], strict=True)
    ]


def spend_deciles(part: TestRows) -> Rows:
    """Mean predicted and actual amount by decile of the prediction, best first, per model."""
    rows: Rows = []
    for model, p in part.predictions.items():
        deciles = np.array_split(np.argsort(-p, kind="stable"), BINS)
        rows += [
            {
                "target": part.target.name,
                "model": model,
                "decile": number,
                "predicted": _round(p[b].mean()),
                "actual": _round(part.y[b].mean()),
            }
            for number, b in enumerate(deciles, start=1)
            if len(b)
        ]
    return rows


def _thin(part: TestRows, model: str, **columns: Floats) -> Rows:
    """At most POINTS rows, evenly spread, the ends included."""
    length = len(next(iter(columns.values())))
    keep = np.unique(np.linspace(0, length - 1, min(POINTS, length)).round().astype(int))
    return [
        {
            "target": part.target.name,
            "model": model,
            **{name: _round(values[i]) for name, values in columns.items()},
        }
        for i in keep
    ]


def _round(value: float) -> float:
    return round(float(value), 6)
