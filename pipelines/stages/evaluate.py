"""Stage: compare all models on the test cuts and write the report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.config import Params
from pipelines.errors import UserError
from pipelines.evaluation.comparison import (
    Predictions,
    TestRows,
    collect_test_rows,
    compare,
)
from pipelines.evaluation.curves import (
    calibration_curve,
    confusion_rows,
    lift_curve,
    pr_curve,
    roc_curve,
    spend_deciles,
)
from pipelines.evaluation.drift import measure_drift
from pipelines.evaluation.ranking import compare_rankings
from pipelines.evaluation.report import render_report
from pipelines.evaluation.rivals import CANDIDATE, CHAMPION, NETWORK
from pipelines.evaluation.slices import find_slices, score_slices
from pipelines.events import to_us
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import Floats, SnapshotTable
from pipelines.io import read_json, write_json, write_text
from pipelines.model.predictor import Predictor

FEATURES = Path("data/features")
MODEL = Path("models/gpt")
REPORTS = Path("reports")

# Columns of each plot file, written even where a run has no rows for it.
_PLOTS = {
    "roc": ("target", "model", "false_positive_rate", "true_positive_rate"),
    "pr": ("target", "model", "recall", "precision"),
    "lift": ("target", "model", "share", "captured", "lift"),
    "calibration": ("target", "model", "predicted", "observed", "rows"),
    "confusion": ("actual", "predicted"),
    "spend": ("target", "model", "decile", "predicted", "actual"),
}


def run(params: Params, root: Path = Path()) -> str:
    """Write reports/evaluation.json, reports/plots and reports/index.html.

    Raises:
        UserError: an input is missing or does not fit the others.
    """
    table = SnapshotTable.load(root / FEATURES)
    predictions = _read_predictions(root, table)
    predictor = Predictor.load(root / MODEL)
    shipped = {CANDIDATE: predictor.spec.thresholds}
    champion = _load_champion(root)
    seen = champion is not None and _has_seen(champion, table)
    if champion is not None and not seen:
        predictions[CHAMPION] = _predict(champion, root, table)
        shipped[CHAMPION] = champion.spec.thresholds
    test = collect_test_rows(table, predictions, params.evaluation, shipped=shipped)
    evaluation = compare(table, test, params.evaluation, data=_describe_data(params, root))
    if champion is not None:
        told = [] if seen else [target.name for target in champion.targets]
        evaluation["champion"] = {"targets": told, "learnt_from_tests": seen}
    evaluation["drift"] = measure_drift(table)
    rows = table.rows_of(Split.TEST)
    slices = find_slices(table, rows)
    for part in test:
        # Of what is looked at most closely, and of what the gate decides by.
        judged = part.target.name == params.gate.primary_target
        if part.target.kind is Kind.BINARY and (judged or _is_primary(params, part)):
            evaluation["targets"][part.target.name]["slices"] = score_slices(
                part, table.user[rows], slices, params.evaluation
            )
    found = _compare_items(params, root, table)
    if found is not None:
        evaluation["next_item"] = found
    tested = _test_explanation(params, root, table, predictor)
    if tested is not None:
        evaluation["explanation"] = tested
    curves = _collect_curves(params, test)
    write_json(root / REPORTS / "evaluation.json", evaluation)
    for name, columns in _PLOTS.items():
        write_text(root / REPORTS / "plots" / f"{name}.csv", _to_csv(curves[name], columns))
    page = render_report(
        evaluation,
        curves,
        settings={
            "bootstrap_samples": params.evaluation.bootstrap_samples,
            "confidence": params.evaluation.confidence,
            "threshold": params.evaluation.threshold,
            "primary_horizon_days": params.targets.primary_horizon_days,
            "active_within_days": read_json(root / FEATURES / "schema.json")[
                "population_active_within_days"
            ],
        },
    )
    write_text(root / REPORTS / "index.html", page)
    return (
        f"{len(predictions)} models on {len(table.targets)} targets, "
        f"{table.rows_of(Split.TEST).sum():,} test rows; see {REPORTS / 'index.html'}"
    )


def _read_predictions(root: Path, table: SnapshotTable) -> Predictions:
    folder = root / "data/predictions"
    files = {name: folder / f"{name}.parquet" for name in (CANDIDATE, NETWORK)}
    baselines = {f.stem: f for f in sorted((folder / "baselines").glob("*.parquet"))}
    if not baselines:
        raise UserError(f"{folder / 'baselines'}: no predictions; run the stages before")
    files |= baselines | {f.stem: f for f in sorted((folder / "backbones").glob("*.parquet"))}
    rows = table.rows_of(Split.CALIBRATION, Split.TEST)
    predictions: Predictions = {}
    for model, file in files.items():
        try:
            found = pq.read_table(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; run the stages before") from None
        if not (
            np.array_equal(found["user"].to_numpy(), table.user[rows])
            and np.array_equal(found["cut"].to_numpy(), table.cut[rows])
        ):
            raise UserError(f"{file}: rows differ from {FEATURES}; run its stage again")
        predictions[model] = {
            t.name: found[t.name].to_numpy().astype(np.float64)
            for t in table.targets
            if t.name in found.column_names
        }
    return predictions


def _compare_items(params: Params, root: Path, table: SnapshotTable) -> dict[str, Any] | None:
    """Compare what was told to come next with the first item touched within the horizon."""
    from pipelines.features.store import Sequences
    from pipelines.model.timeline import DAY, Timeline

    folder = root / "data/predictions"
    files = {NETWORK: folder / f"{NETWORK}_items.parquet"}
    files |= {f.stem: f for f in sorted((folder / "items").glob("*.parquet"))}
    rows = table.rows_of(Split.TEST)
    user, cut = table.user[rows], table.cut[rows]
    rankings = {}
    for model, file in files.items():
        try:
            found = pq.read_table(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; run the stages before") from None
        if not (
            np.array_equal(found["user"].to_numpy(), user)
            and np.array_equal(found["cut"].to_numpy(), cut)
        ):
            raise UserError(f"{file}: rows differ from {FEATURES}; run its stage again")
        told = found["items"].combine_chunks()
        rankings[model] = told.flatten().to_numpy().reshape(len(user), -1).astype(np.int64)
    vocabulary = read_json(root / FEATURES / "vocabulary.json")["item"][: params.train.next_items]
    codes = {hashed: code for code, hashed in enumerate(vocabulary)} | {0: -2}
    timeline = Timeline(Sequences.load(root / FEATURES / "sequences"))
    times = {c["index"]: c["ts_us"] for c in read_json(root / FEATURES / "cuts.json")["cuts"]}
    now = np.array([times[int(c)] for c in cut], dtype=np.int64)
    close = now + params.targets.primary_horizon_days * DAY
    following = timeline.next_item(timeline.cuts(user, now), close)
    return compare_rankings(
        user,
        np.array([codes.get(int(hashed), -1) for hashed in following], dtype=np.int64),
        rankings,
        candidate=NETWORK,
        items=len(vocabulary),
        config=params.evaluation,
    )


def _test_explanation(
    params: Params, root: Path, table: SnapshotTable, predictor: Predictor
) -> dict[str, Any] | None:
    """Delete what explanations of the candidate put first, at the last test cut."""
    from pipelines.evaluation.deletion import measure_deletion
    from pipelines.features.store import Sequences

    days = params.targets.primary_horizon_days
    wanted = [t for t in predictor.targets if t.kind == "binary" and t.event is not None]
    wanted = [t for t in wanted if t.horizon_days == days] or wanted
    if not wanted:
        return None
    rows = table.rows_of(Split.TEST)
    last = table.cut[rows].max()
    times = {c["index"]: c["ts_us"] for c in read_json(root / FEATURES / "cuts.json")["cuts"]}
    return measure_deletion(
        predictor,
        Sequences.load(root / FEATURES / "sequences"),
        table.user[rows & (table.cut == last)].astype(np.int64),
        times[int(last)],
        wanted[0],
        params.evaluation,
    )


def _load_champion(root: Path) -> Predictor | None:
    """Return the champion, if there is one."""
    from pipelines.registry.champion import fetch_champion

    model = fetch_champion(root)
    if model is None:
        return None
    try:
        return Predictor.load(model)
    except UserError as error:
        raise UserError(
            f"the champion cannot be compared with: {error}; if another version trained it, go on "
            "with that version, or without a champion (put back the champion.json of before it)"
        ) from None


def _has_seen(predictor: Predictor, table: SnapshotTable) -> bool:
    """Tell whether a model has learnt from a window that it would be judged by.

    So it is where the test cuts move back: a longer horizon, more of them, an earlier end.
    """
    learnt = predictor.spec.learnt_until
    return learnt is not None and learnt > to_us(table.first_cut(Split.TEST))


def _predict(predictor: Predictor, root: Path, table: SnapshotTable) -> dict[str, Floats]:
    """Score a model on today's data."""
    from pipelines.features.store import Sequences

    sequences = Sequences.load(root / FEATURES / "sequences")
    cuts = {c["index"]: c["ts_us"] for c in read_json(root / FEATURES / "cuts.json")["cuts"]}
    rows = np.flatnonzero(table.rows_of(Split.CALIBRATION, Split.TEST))
    parts: dict[str, list[Floats]] = {}
    for cut in np.unique(table.cut[rows]):
        users = table.user[rows][table.cut[rows] == cut]
        now = np.full(len(users), cuts[int(cut)], dtype=np.int64)
        for name, values in predictor.predict(sequences.take(users), now).items():
            parts.setdefault(name, []).append(np.asarray(values, dtype=np.float64))
    known = {t.name for t in table.targets}
    return {name: np.concatenate(p) for name, p in parts.items() if name in known}


def _describe_data(params: Params, root: Path) -> dict[str, Any]:
    cuts = read_json(root / FEATURES / "cuts.json")
    offsets = np.load(root / FEATURES / "sequences/offsets.npy", allow_pickle=False)
    read = read_json(root / REPORTS / "ingest.json")
    checked = read_json(root / REPORTS / "validation.json")
    return {
        "source": str(params.ingest.source),
        "events": int(offsets[-1]),
        "users": len(offsets) - 1,
        "first_ts": cuts["first_ts"],
        "last_ts": cuts["last_ts"],
        "share_of_shoppers": read_json(root / FEATURES / "schema.json")["share_of_shoppers"],
        "rows": read["rows"],
        "quarantined": read["quarantined"]["rows"] + checked["quarantined"],
        "anonymous": read["anonymous"],
        "duplicates": read["duplicates"],
    }


def _collect_curves(params: Params, test: Sequence[TestRows]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in _PLOTS}
    for part in test:
        if part.target.kind is Kind.AMOUNT:
            curves["spend"] += spend_deciles(part)
            continue
        curves["calibration"] += calibration_curve(part)
        curves["roc"] += roc_curve(part)
        curves["pr"] += pr_curve(part)
        curves["lift"] += lift_curve(part)
        if _is_primary(params, part):
            curves["confusion"] = confusion_rows(part, CANDIDATE)
    return curves


def _is_primary(params: Params, part: TestRows) -> bool:
    """Is it the first event within the primary horizon, which is looked at most closely?"""
    target = part.target
    return (
        target.kind is Kind.BINARY
        and target.event == params.targets.events[0]
        and target.horizon_days == params.targets.primary_horizon_days
    )


def _to_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
