"""Stage: fit what the behaviour model must beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.baselines.boosting import Boosting
from pipelines.baselines.linear import Linear
from pipelines.baselines.protocol import fit_twice
from pipelines.baselines.simple import Majority, Recency
from pipelines.config import Params
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, SnapshotTable
from pipelines.io import progress, replace_directory, write_json, write_table, write_text

FEATURES = Path("data/features")
MODELS = Path("models/baselines")
PREDICTIONS = Path("data/predictions/baselines")


def run(params: Params, root: Path = Path()) -> str:
    """Fit all baselines on all targets; write models and predictions.

    Raises:
        UserError: data/features is missing.
    """
    table = SnapshotTable.load(root / FEATURES)
    boosting = Boosting(table, params.baselines)
    predictions: dict[str, dict[str, Floats]] = {}
    fitted: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for target in progress(table.targets, "baselines", unit="target"):
        for name, first, second in _make_pairs(table, target):
            values = fit_twice(table, target, first, second)
            predictions.setdefault(name, {})[target.name] = values
            fitted.setdefault(name, {})[target.name] = second.to_dict()
        values, texts[target.name] = boosting.fit_target(target)
        predictions.setdefault("lightgbm", {})[target.name] = values
    with replace_directory(root / MODELS) as folder:
        for name, parameters in fitted.items():
            write_json(folder / f"{name}.json", {"features": table.feature_names} | parameters)
        for name, text in texts.items():
            write_text(folder / "lightgbm" / f"{name}.txt", text)
    with replace_directory(root / PREDICTIONS) as folder:
        for name, columns in predictions.items():
            write_table(folder / f"{name}.parquet", table.predictions_table(columns))
    return f"{', '.join(predictions)} on {len(table.targets)} targets in {MODELS}"


def _make_pairs(table: SnapshotTable, target: Target) -> list[tuple[str, Any, Any]]:
    event = target.event or ("purchase" if target.kind is Kind.AMOUNT else None)
    name = f"f_recency_{event}" if event else "f_recency"
    column = table.feature_names.index(name)
    linear = "logistic" if target.kind is Kind.BINARY else "linear"
    return [
        ("majority", Majority(), Majority()),
        ("recency", Recency(column), Recency(column)),
        (linear, Linear(target.kind), Linear(target.kind)),
    ]
