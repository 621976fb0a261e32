"""How well groups of shoppers are predicted: a good mean may hide a group that lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from pipelines.config import Evaluation
from pipelines.evaluation.comparison import TestRows
from pipelines.evaluation.metrics import (
    Floats,
    binary_metrics,
    clean,
    draw_weights,
    interval,
    summarise_all,
)
from pipelines.evaluation.rivals import CANDIDATE
from pipelines.features.snapshot_table import Mask, SnapshotTable

_METRICS: Final = ("roc_auc", "ece")
_RIVALS: Final = ("lightgbm", "recency", "champion")
_NEW_DAYS: Final = 28.0
_LIGHT_EVENTS: Final = 5.0
_SEGMENTS: Final = 6  # largest regions and genders that are told


def find_slices(table: SnapshotTable, rows: Mask) -> dict[str, Mask]:
    """Return groups of some rows of the table by name, each a mask over those rows.

    New shoppers came in the last four weeks, light ones did at most five things ever; the others
    are the regions and genders that the snapshots know.
    """
    names = table.feature_names
    found: dict[str, Mask] = {}

    def column(name: str) -> Floats | None:
        return table.features[rows, names.index(name)] if name in names else None

    tenure, events = column("f_tenure"), column("f_events")
    if tenure is not None:
        found["new"] = tenure <= _NEW_DAYS
        found["not new"] = tenure > _NEW_DAYS
    if events is not None:
        found["light"] = events <= _LIGHT_EVENTS
        found["not light"] = events > _LIGHT_EVENTS
    for kind in ("gender", "region"):
        values = column(f"f_{kind}")
        if values is None:
            continue
        codes, counts = np.unique(values[np.isfinite(values)], return_counts=True)
        for code in codes[np.argsort(-counts, kind="stable")][:_SEGMENTS]:
            found[f"{kind} {int(code)}"] = values == code
    return {name: mask for name, mask in found.items() if mask.any() and not mask.all()}


def score_slices(
    part: TestRows,
    user: Any,
    slices: Mapping[str, Mask],
    config: Evaluation,
) -> dict[str, Any]:
    """Score the candidate and its rivals in every group.

    Args:
        part: outcomes and predictions of a binary target, N rows.
        user: (N,) of every row.
        slices: masks over the rows.
        config: samples, confidence and seed.

    Returns:
        By group: rows, positives, models' metrics with intervals, and paired differences of the
        candidate. Groups in which everybody or nobody did it are left out.
    """
    found: dict[str, Any] = {}
    for name, mask in slices.items():
        y = part.y[mask]
        if len(np.unique(y)) < 2:
            continue
        weights = draw_weights(user[mask], samples=config.bootstrap_samples, seed=config.seed)
        models: Sequence[str] = [m for m in (CANDIDATE, *_RIVALS) if m in part.predictions]
        samples = {
            model: binary_metrics(
                y, part.predictions[model][mask], weights, threshold=part.thresholds[model]
            )
            for model in models
        }
        gains = {
            f"{CANDIDATE}-{other}": _difference(
                samples[CANDIDATE]["roc_auc"] - samples[other]["roc_auc"], config.confidence
            )
            for other in models
            if other != CANDIDATE
        }
        found[name] = {
            "rows": int(mask.sum()),
            "positives": int((y > 0).sum()),
            "models": {
                model: summarise_all({m: samples[model][m] for m in _METRICS}, config.confidence)
                for model in models
            },
            "paired": gains,
        }
    return found


def _difference(samples: Floats, confidence: float) -> dict[str, float | None]:
    low, high = interval(samples[1:], confidence)
    return {"diff": clean(samples[0]), "low": low, "high": high}
