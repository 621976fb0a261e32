"""Compares all models on the test cuts: reports/evaluation.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Evaluation
from pipelines.evaluation.conformal import PredictionSets, make_sets
from pipelines.evaluation.metrics import (
    Floats,
    amount_metrics,
    best_gini,
    binary_metrics,
    calibration_error,
    chance_of_calibration_error,
    clean,
    draw_weights,
    interval,
    summarise_all,
)
from pipelines.evaluation.rivals import CANDIDATE, NETWORK
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.io import progress
from pipelines.model.calibration import choose_threshold

ORACLE: Final = "oracle"  # what is best to say of a simulated shop
# Gives everybody the commoner answer, whatever thresholds are chosen by.
_MAJORITY: Final = "majority"
_EVEN_ODDS: Final = 0.5
# Who is compared with everybody; the others are compared with these.
_PIVOTS: Final = (CANDIDATE, NETWORK, "lightgbm")

# Model name -> target name -> predictions on the calibration and test rows.
Predictions = dict[str, dict[str, Floats]]


@dataclass(frozen=True, kw_only=True)
class TestRows:
    """Outcomes and predictions of one target on the test cuts.

    Attributes:
        target: which.
        y: (N,) outcomes.
        predictions: model name -> (N,).
        thresholds: model name -> probability; empty for amounts.
        sets: the candidate's prediction sets; None for amounts and where there can be none.
    """

    target: Target
    y: Floats
    predictions: dict[str, Floats]
    thresholds: dict[str, float]
    sets: PredictionSets | None = None


def collect_test_rows(
    table: SnapshotTable,
    predictions: Predictions,
    config: Evaluation,
    *,
    shipped: Mapping[str, Mapping[str, float]] | None = None,
) -> list[TestRows]:
    """Cut out the test rows of every target and choose thresholds on the calibration rows.

    Args:
        table: the snapshots.
        predictions: of every model.
        config: what thresholds are chosen by, and the level of prediction sets.
        shipped: model name -> target name -> the threshold that the model has for itself, which is
            what those who use it call by.
    """
    shipped = shipped or {}
    rows = table.rows_of(Split.CALIBRATION, Split.TEST)
    calibration = table.rows_of(Split.CALIBRATION)[rows]
    collected = []
    for target in table.targets:
        y = table.labels[target.name][rows]
        models = {m: p[target.name] for m, p in predictions.items() if target.name in p}
        thresholds = {}
        sets = None
        if target.kind is Kind.BINARY:
            if CANDIDATE in models:
                p = models[CANDIDATE]
                sets = make_sets(
                    y[calibration],
                    p[calibration],
                    p[~calibration],
                    level=config.conformal_level,
                )
            thresholds = {
                m: shipped.get(m, {}).get(target.name)
                or _choose(m, p[calibration], y[calibration] > 0, config)
                for m, p in models.items()
            }
        collected.append(
            TestRows(
                target=target,
                y=y[~calibration],
                predictions={m: p[~calibration] for m, p in models.items()},
                thresholds=thresholds,
                sets=sets,
            )
        )
    return collected


def _choose(model: str, p: Floats, label: NDArray[np.bool_], config: Evaluation) -> float:
    """Choose a threshold; a model without predictions to choose by calls at even odds."""
    if model == _MAJORITY or not len(p) or not np.isfinite(p).all():
        return _EVEN_ODDS
    return choose_threshold(p, label, config.threshold)


def compare(
    table: SnapshotTable, test: list[TestRows], config: Evaluation, *, data: dict[str, Any]
) -> dict[str, Any]:
    """Score all models on all targets with paired bootstrap intervals.

    Args:
        table: the snapshots.
        test: of ``collect_test_rows``.
        config: samples, confidence and seed.
        data: the data block of the report.

    Returns:
        The content of reports/evaluation.json.
    """
    rows = table.rows_of(Split.TEST)
    weights = draw_weights(table.user[rows], samples=config.bootstrap_samples, seed=config.seed)
    cuts = [table.cut_times[c] for c, split in table.splits.items() if split is Split.TEST]
    targets: dict[str, dict[str, Any]] = {}
    # The sums over the samples run in NumPy outside the interpreter's lock.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        scores = pool.map(lambda part: _score_models(part, weights, config), test)
        scored = list(progress(scores, "evaluation", total=len(test), unit="target"))
    for part, score in zip(test, scored, strict=True):
        targets[part.target.name] = {
            "kind": str(part.target.kind),
            "horizon_days": part.target.horizon_days,
            "base_rate": clean(part.y.mean()),
            "users": len(np.unique(table.user[rows])),
            "rows": len(part.y),
            "positives": int((part.y > 0).sum()),
            "cuts": cuts,
            **score,
        }
        if part.sets is not None:
            targets[part.target.name]["conformal"] = part.sets.describe(part.y)
    return {"data": data, "targets": targets, "omitted": table.omitted}


def _score_models(part: TestRows, weights: Floats, config: Evaluation) -> dict[str, Any]:
    samples: dict[str, dict[str, Floats]] = {}
    models: dict[str, Any] = {}
    best = best_gini(part.y, weights) if part.target.kind is Kind.AMOUNT else None
    exact = part.predictions.get(ORACLE)
    for name, p in part.predictions.items():
        if part.target.kind is Kind.BINARY:
            threshold = part.thresholds[name]
            samples[name] = binary_metrics(part.y, p, weights, threshold=threshold)
        else:
            samples[name] = amount_metrics(part.y, p, weights, best)
        models[name] = summarise_all(samples[name], config.confidence)
        if part.target.kind is Kind.BINARY:
            models[name]["threshold"] = clean(part.thresholds[name])
            models[name]["ece_by_chance"] = chance_of_calibration_error(
                p,
                samples=config.bootstrap_samples,
                confidence=config.confidence,
                seed=config.seed,
            )
            if exact is not None:
                # The oracle's probabilities in place of what happened: nothing is left to chance.
                error = calibration_error(exact, p, weights[:1])
                models[name]["ece_to_oracle"] = clean(error[0])
    pairs = [(a, b) for a in _PIVOTS for b in samples if a in samples and a != b]
    paired = {}
    for a, b in pairs:
        if f"{b}-{a}" in paired:
            continue
        paired[f"{a}-{b}"] = {
            metric: _difference(samples[a][metric], samples[b][metric], config.confidence)
            for metric in samples[a]
        }
    return {"models": models, "paired": paired}


def _difference(a: Floats, b: Floats, confidence: float) -> dict[str, float | None]:
    difference = a - b
    low, high = interval(difference[1:], confidence)
    return {"diff": clean(difference[0]), "low": low, "high": high}
