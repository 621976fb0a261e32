"""Stage: event sequences, snapshot features and labels at the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _

from pipelines.config import Params
from pipelines.errors import UserError
from pipelines.features.cuts import Cut, Split, describe_cuts, find_end, plan_cuts
from pipelines.features.engine import (
    connect,
    index_users,
    microseconds,
    prepare_events,
    read_parquet,
)
from pipelines.features.labels import Kind, Target, build_labels, list_targets
from pipelines.features.sequences import build_sequences
from pipelines.features.snapshots import build_snapshots
from pipelines.features.store import hash_text
from pipelines.features.vocabulary import fit_scalers, fit_vocabulary
from pipelines.io import progress, replace_directory, write_json, write_table

EVENTS = Path("data/valid")
PROFILES = Path("data/entities/users.parquet")
OUTPUT = Path("data/features")


def run(params: Params, root: Path = Path()) -> str:
    """Build data/features.

    Raises:
        UserError: no events, too short a span, or no target that can be learnt.
    """
    connection = connect(params.features.engine)
    events = read_parquet(connection, _require(root / EVENTS)).cache()
    users = index_users(events, read_parquet(connection, _require(root / PROFILES))).cache()
    first, last = _find_span(events)
    end = find_end(last, params.ingest.until)
    cuts = plan_cuts(first, end, horizon_days=params.targets.horizons_days[-1], params=params.cuts)
    calibration = next(c for c in cuts if c.split is Split.CALIBRATION)

    sequences = build_sequences(connection, events, users)
    vocabulary = fit_vocabulary(
        sequences, before_us=calibration.us, max_size=params.features.max_vocabulary
    )
    scalers = fit_scalers(sequences, before_us=calibration.us)
    snapshots = _collect_snapshots(params, connection, events, users, cuts, vocabulary)
    targets, omitted = choose_targets(snapshots, cuts, list_targets(params.targets))
    snapshots = snapshots.drop_columns([f"y_{note['name']}" for note in omitted])

    with replace_directory(root / OUTPUT) as folder:
        (folder / "sequences").mkdir()
        sequences.save(folder / "sequences")
        people = users.order_by("user").to_pyarrow()
        write_table(
            folder / "users.parquet",
            people.select(["user", "user_id", "age", "gender", "region", "signup_ts"]),
        )
        write_table(folder / "snapshots.parquet", snapshots)
        write_json(folder / "cuts.json", describe_cuts(cuts, first=first, last=last, end=end))
        write_json(folder / "vocabulary.json", vocabulary)
        write_json(folder / "scalers.json", scalers)
        write_json(
            folder / "schema.json",
            {
                "features": [n for n in snapshots.column_names if n.startswith("f_")],
                "targets": [
                    {
                        "name": t.name,
                        "kind": str(t.kind),
                        "event": t.event,
                        "horizon_days": t.horizon_days,
                    }
                    for t in targets
                ],
                "omitted": omitted,
                "population_active_within_days": params.population.active_within_days,
            },
        )
    notes = "".join(f"; {note['name']} left out: {note['why']}" for note in omitted)
    return (
        f"{sequences.events:,} events of {sequences.users:,} users, "
        f"{snapshots.num_rows:,} snapshots at {len(cuts)} cuts, {len(targets)} targets "
        f"in {OUTPUT}{notes}"
    )


def _require(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; run the stages before")
    return path


def _find_span(events: Any) -> tuple[datetime, datetime]:
    found = events.aggregate(first=_.ts.min(), last=_.ts.max()).to_pyarrow().to_pylist()[0]
    if found["first"] is None:
        raise UserError(f"{EVENTS}: no events")
    return found["first"], found["last"]


def _collect_snapshots(
    params: Params,
    connection: Any,
    events: Any,
    users: Any,
    cuts: Sequence[Cut],
    vocabulary: dict[str, list[int]],
) -> pa.Table:
    prepared = prepare_events(connection, events, users).cache()
    coded = users.mutate(
        gender_code=_code_profile(users.gender, users, "gender", vocabulary["gender"]),
        signup_us=microseconds(connection, users.signup_ts),
        region_code=_code_profile(users.region, users, "region", vocabulary["region"]),
    ).cache()
    targets = list_targets(params.targets)
    tables = []
    for cut in progress(cuts, "snapshots", unit="cut"):
        features = build_snapshots(
            prepared,
            coded,
            cut=cut,
            windows_days=params.features.windows_days,
            active_within_days=params.population.active_within_days,
        ).cache()
        labels = build_labels(prepared, features, cut=cut, targets=targets)
        rows = features.left_join(labels, "user").drop("user_right").order_by("user")
        tables.append(_tidy(rows.to_pyarrow()))
    return pa.concat_tables(tables)


def _code_profile(column: Any, users: Any, name: str, known: list[int]) -> Any:
    """Number of the value in the vocabulary, from 1; 0 unknown; null missing."""
    codes = {code: number for number, code in enumerate(known, start=1)}
    values = users.filter(column.notnull()).select(name).distinct().to_pyarrow()[name].to_pylist()
    branches = [(column == v, codes.get(hash_text(v), 0)) for v in sorted(values)]
    if not branches:
        return ibis.null("int32")
    return ibis.cases(*branches, else_=ibis.null("int32")).cast("int32")


def _tidy(table: pa.Table) -> pa.Table:
    """user, cut, f_..., y_... with one number type each, whatever the engine made of them."""
    names = table.column_names
    ordered = [
        "user",
        "cut",
        *(n for n in names if n.startswith("f_")),
        *(n for n in names if n.startswith("y_")),
    ]
    types = {"user": pa.int32(), "cut": pa.int32()}
    columns = {n: table[n].cast(types.get(n, pa.float64())).combine_chunks() for n in ordered}
    return pa.table(columns)


def choose_targets(
    snapshots: pa.Table, cuts: Sequence[Cut], targets: Sequence[Target]
) -> tuple[list[Target], list[dict[str, str]]]:
    """Leave out what cannot be learnt: a target with one outcome only in training.

    Returns:
        The targets kept, and notes {"name", "why"} on the others.

    Raises:
        UserError: none is left.
    """
    train = pa.array([c.index for c in cuts if c.split is Split.TRAIN], pa.int32())
    rows = snapshots.filter(pc.is_in(snapshots["cut"], value_set=train))
    kept, omitted = [], []
    for target in targets:
        y = rows[f"y_{target.name}"].to_numpy()
        what = f"no {target.event}" if target.event else f"no {target.name.split('_')[0]}"
        if not len(y) or y.max() <= 0:
            omitted.append({"name": target.name, "why": f"{what} in any training window"})
        elif target.kind is Kind.BINARY and np.min(y) > 0:
            omitted.append({"name": target.name, "why": "it happens to everybody in training"})
        else:
            kept.append(target)
    if not kept:
        raise UserError("no target can be learnt: " + "; ".join(n["why"] for n in omitted))
    return kept, omitted
