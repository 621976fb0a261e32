"""Stage: fit what the behaviour model must beat, and for a simulated shop what nothing can beat."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipelines.baselines import histories, items
from pipelines.baselines.bgnbd import BuyTillYouDie
from pipelines.baselines.boosting import Boosting
from pipelines.baselines.density import Density
from pipelines.baselines.linear import Linear, scale
from pipelines.baselines.protocol import fit_twice
from pipelines.baselines.simple import Majority, Recency
from pipelines.config import EnsembleTrees, Params, Source, Train
from pipelines.errors import UserError
from pipelines.events import to_us
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, SnapshotTable
from pipelines.features.store import Sequences
from pipelines.io import progress, read_json, replace_directory, write_json, write_table, write_text
from pipelines.model.training import train_model
from pipelines.sources.oracle import predict_oracle_table
from pipelines.sources.simulator import SimulatorParams
from pipelines.stages.train import load_inputs, predict_alone

FEATURES = Path("data/features")
EVENTS = Path("data/valid")
USERS = Path("data/entities/users.parquet")
MODELS = Path("models/baselines")
PREDICTIONS = Path("data/predictions/baselines")
ITEMS = Path("data/predictions/items")


def run(params: Params, root: Path = Path()) -> str:
    """Fit all baselines on all targets; write models and predictions.

    Raises:
        UserError: an input is missing or does not fit the others.
    """
    table = SnapshotTable.load(root / FEATURES)
    sequences = Sequences.load(root / FEATURES / "sequences")
    events = dict.fromkeys(_find_event(target) for target in table.targets)
    past = {event: histories.Histories(sequences, event) for event in events}
    known = {event: histories.with_histories(table, past[event]) for event in events}
    scaled, scaling = scale(table)
    oracle: dict[str, Floats] = {}
    if params.ingest.source is Source.SIMULATOR:
        # Two threads take twice the processor, and no less time.
        with threadpool_limits(1):
            oracle = _predict_oracle(params, root, table)
    predictions: dict[str, dict[str, Floats]] = {}
    fitted: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    # Trees of small data gain little from threads of their own; targets side by side do. The
    # longest task is the first: at the end it would run alone.
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1):
        boosting = Boosting(table, params.baselines)
        lstm = None
        if params.baselines.lstm.epochs != 0:
            lstm = pool.submit(_predict_lstm, root, params)
        results = pool.map(
            lambda t: _fit_target(
                table, scaled, known[_find_event(t)], past[_find_event(t)], t, boosting
            ),
            table.targets,
        )
        fits = progress(results, "baselines", total=len(table.targets), unit="target")
        for target, (values, parameters, text) in zip(table.targets, fits, strict=True):
            for name, value in values.items():
                predictions.setdefault(name, {})[target.name] = value
            for name, value in parameters.items():
                fitted.setdefault(name, {})[target.name] = value
            texts[target.name] = text
        recurrent = lstm.result() if lstm else None
    if oracle:
        predictions["oracle"] = oracle
    with replace_directory(root / ITEMS) as folder:
        for name, ranked in _rank_items(root, table, sequences, params.train.next_items).items():
            write_table(folder / f"{name}.parquet", ranked)
    with replace_directory(root / MODELS) as folder:
        for name, parameters in fitted.items():
            names = histories.COLUMNS if name in ("density", "bgnbd") else table.feature_names
            shared: dict[str, Any] = {"features": names}
            if name in ("linear", "logistic"):
                shared["scaling"] = scaling.to_dict()
            write_json(folder / f"{name}.json", shared | parameters)
        for name, text in texts.items():
            write_text(folder / "lightgbm" / f"{name}.txt", text)
    with replace_directory(root / PREDICTIONS) as folder:
        for name, columns in predictions.items():
            write_table(folder / f"{name}.parquet", table.predictions_table(columns))
        if recurrent is not None:
            write_table(folder / "lstm.parquet", recurrent)
    names = [*predictions, *(["lstm"] if recurrent is not None else [])]
    return f"{', '.join(names)} on {len(table.targets)} targets in {MODELS}"


def _predict_lstm(root: Path, params: Params) -> pa.Table:
    """Train an LSTM on the raw events, and predict the calibration and test rows.

    The recurrent network that a user would try first (Hochreiter & Schmidhuber, Neural
    Computation 9, 1997): the events in, the horizon labels out. It gets the trainer, the refit
    and the calibration of the behaviour model; not its windowed counts, pretraining or other
    tasks.
    """
    sequences, periods, targets, vocabulary = load_inputs(root)
    settings = choose_lstm_settings(params)
    trained = train_model(sequences, periods, targets, settings, vocabulary)
    return predict_alone(trained, sequences, root, settings)


def choose_lstm_settings(params: Params) -> Train:
    """Return how the LSTM is trained: as the behaviour model, but for what is its own."""
    config, train = params.baselines.lstm, params.train
    own: dict[str, Any] = {
        "backbone": "lstm",
        "compare": (),
        "threads": 1,  # beside the trees
        "compile": "auto",
        "epochs": config.epochs if config.epochs is not None else train.epochs,
        "width": config.width,
        "layers": config.layers,
        "heads": 1,
        "context": config.context,
        "stride": max(1, config.context * 3 // 4),
        "tokens_per_batch": config.tokens_per_batch or train.tokens_per_batch,
        "accumulate": 1,
        "processes": 1,
        "learning_rate": config.learning_rate,
        "dropout": 0.0,
        "fusion": False,
        "members": 1,
        "next_event_weight": 0.0,
        "next_items": 0,
        "item_weight": 0.0,
        "trees": EnsembleTrees(rounds=0),
        "seed": params.baselines.seed,
    }
    return train.model_copy(update=own)


def _predict_oracle(params: Params, root: Path, table: SnapshotTable) -> dict[str, Floats]:
    """Say what is best to say of a simulated shop, on the calibration and test rows.

    Raises:
        UserError: an input is missing or damaged.
    """
    simulator = SimulatorParams(**params.ingest.simulator.model_dump())
    try:
        events = ds.dataset(root / EVENTS, format="parquet", exclude_invalid_files=True).to_table(
            columns=["user_id", "ts", "event_type", "item_id", "category", "query"]
        )
        users = pq.read_table(root / USERS)
        ids = pq.read_table(root / FEATURES / "users.parquet")["user_id"]
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"not readable: {error}; run the stages before") from None
    rows = np.flatnonzero(table.rows_of(Split.CALIBRATION, Split.TEST))
    horizons = sorted({t.horizon_days for t in table.targets})
    predicted = {t.name: np.full(len(rows), np.nan) for t in table.targets}
    for cut in np.unique(table.cut[rows]):
        here = table.cut[rows] == cut
        found = predict_oracle_table(
            simulator,
            events=events,
            users=users,
            cut=datetime.fromisoformat(table.cut_times[int(cut)]),
            user_ids=ids.take(pa.array(table.user[rows][here])).to_pylist(),
            horizons_days=horizons,
        )
        for name, values in predicted.items():
            if name in found:
                values[here] = found[name]
    # The oracle has a closed form for purchase, search, churn and spend only.
    return {name: values for name, values in predicted.items() if np.isfinite(values).all()}


def _rank_items(
    root: Path, table: SnapshotTable, sequences: Sequences, known: int
) -> dict[str, pa.Table]:
    """Rank the items that may come next at every test row, by ranker."""
    hashes = read_json(root / FEATURES / "vocabulary.json")["item"][:known]
    vocabulary = np.array(hashes, dtype=np.uint32)
    rows = table.rows_of(Split.TEST)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in items.RANKERS}
    for cut in np.unique(table.cut[rows]):
        now = to_us(datetime.fromisoformat(table.cut_times[int(cut)]))
        touches = items.collect_touches(sequences, vocabulary, now)
        users = table.user[rows & (table.cut == cut)].astype(np.int64)
        for name, rank in items.RANKERS.items():
            parts[name].append(rank(touches, users))
    return {
        name: pa.table(
            {
                "user": table.user[rows],
                "cut": table.cut[rows],
                "items": pa.array(list(np.concatenate(ranked)), pa.list_(pa.int32())),
            }
        )
        for name, ranked in parts.items()
    }


def _fit_target(
    table: SnapshotTable,
    scaled: SnapshotTable,
    known: SnapshotTable,
    past: histories.Histories,
    target: Target,
    boosting: Boosting,
) -> tuple[dict[str, Floats], dict[str, Any], str]:
    """Fit all baselines on one target.

    Args:
        table: snapshots with their features.
        scaled: the same as columns of a linear model.
        known: the same with histories of the target's event.
        past: those histories of everybody.
        target: what to predict.
        boosting: of the same table.

    Returns:
        Predictions and parameters by baseline, and the trees as text.
    """
    predictions: dict[str, Floats] = {}
    parameters: dict[str, Any] = {}
    for name, rows, first, second in _make_pairs(table, scaled, known, past, target):
        predictions[name] = fit_twice(rows, target, first, second)
        parameters[name] = second.to_dict()
    predictions["lightgbm"], text = boosting.fit_target(target)
    return predictions, parameters, text


def _find_event(target: Target) -> str | None:
    """Whose history tells of a target; None = that of all events."""
    return target.event or ("purchase" if target.kind is Kind.AMOUNT else None)


def _make_pairs(
    table: SnapshotTable,
    scaled: SnapshotTable,
    known: SnapshotTable,
    past: histories.Histories,
    target: Target,
) -> list[tuple[str, SnapshotTable, Any, Any]]:
    """Name, rows, and two unfitted objects of every baseline."""
    event = _find_event(target)
    column = table.feature_names.index(f"f_recency_{event}" if event else "f_recency")
    linear = "logistic" if target.kind is Kind.BINARY else "linear"
    pairs: list[tuple[str, SnapshotTable, Any, Any]] = [
        ("majority", known, Majority(), Majority()),  # looks at no feature, so at the fewest
        ("recency", table, Recency(column), Recency(column)),
        ("density", known, Density(target), Density(target)),
        (linear, scaled, Linear(target.kind), Linear(target.kind)),
    ]
    if event == "purchase":
        first, second = (
            BuyTillYouDie(target.kind, target.horizon_days, past.at(table.first_cut(split)))
            for split in (Split.CALIBRATION, Split.TEST)
        )
        pairs.append(("bgnbd", known, first, second))
    return pairs
