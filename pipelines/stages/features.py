"""Stage: event sequences, snapshot features and labels at the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis import _

from pipelines.config import Params
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, USER_SCHEMA, check_columns
from pipelines.features.cuts import Cut, Split, describe_cuts, find_end, plan_cuts
from pipelines.features.engine import (
    MAX_AMOUNT,
    connect,
    index_users,
    microseconds,
    prepare_events,
    read_parquet,
)
from pipelines.features.labels import Kind, Target, build_labels, list_targets
from pipelines.features.population import choose_share, draw_users
from pipelines.features.sequences import write_sequences
from pipelines.features.snapshots import build_snapshots, profile_features
from pipelines.features.store import Sequences
from pipelines.features.vocabulary import fit_scalers, fit_vocabulary
from pipelines.io import replace_directory, write_json, write_table

EVENTS: Final = Path("data/valid")
PROFILES: Final = Path("data/entities/users.parquet")
OUTPUT: Final = Path("data/features")

_SPILL: Final = Path("data/.features.spill")


def run(params: Params, root: Path = Path()) -> str:
    """Build data/features.

    Args:
        params: all settings; features, population, targets, cuts and ingest.until are used.
        root: the project's folder.

    Returns:
        One line for people.

    Raises:
        UserError: no events, damaged ones, too short a span, or no target that can be learnt.
    """
    _check_inputs(root)
    with (
        connect(params.features.engine, root / _SPILL) as connection,
        ExitStack() as caches,
        replace_directory(root / OUTPUT) as folder,
    ):
        return _build(params, connection, caches, root, folder)


def _build(params: Params, connection: Any, caches: ExitStack, root: Path, folder: Path) -> str:
    raw = read_parquet(connection, root / EVENTS)
    first, last = _find_span(connection, raw)
    end = find_end(last, params.ingest.until)
    cuts = plan_cuts(first, end, horizons_days=params.targets.horizons_days, params=params.cuts)
    write_json(folder / "cuts.json", describe_cuts(cuts, first=first, last=last, end=end))

    users = index_users(raw, read_parquet(connection, root / PROFILES))
    users = caches.enter_context(users.cache())
    people = users.order_by("user").to_pyarrow()
    write_table(folder / "users.parquet", _tidy_people(people))
    events = caches.enter_context(prepare_events(connection, raw, users).cache())
    (folder / "sequences").mkdir()
    sequences, items = write_sequences(connection, events, people, folder / "sequences")

    calibration = next(c for c in cuts if c.split is Split.CALIBRATION)
    vocabulary = fit_vocabulary(
        sequences, before_us=calibration.us, max_size=params.features.max_vocabulary
    )
    names = [items[code] for code in vocabulary["item"]]
    write_json(folder / "vocabulary.json", {**vocabulary, "item_id": names})
    write_json(folder / "scalers.json", fit_scalers(sequences, before_us=calibration.us))

    active_days = params.population.active_within_days
    share = choose_share(
        sequences, cuts, active_within_days=active_days, most=params.features.max_shoppers
    )
    drawn = folder / "drawn.parquet"
    if share < 1.0:
        write_table(drawn, pa.table({"user": draw_users(people["user_id"], share)}))
        some = events.semi_join(read_parquet(connection, drawn), "user")
        events = caches.enter_context(some.cache())
    wanted = list_targets(params.targets)
    snapshots = _collect_snapshots(params, events, sequences, cuts, wanted, vocabulary)
    drawn.unlink(missing_ok=True)
    _check_population(snapshots, cuts, active_days)
    targets, omitted = choose_targets(snapshots, cuts, wanted)
    snapshots = snapshots.drop_columns([f"y_{note['name']}" for note in omitted])
    write_table(folder / "snapshots.parquet", snapshots)
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
            "population_active_within_days": active_days,
            "share_of_shoppers": share,
        },
    )
    notes = "".join(f"; {note['name']} left out: {note['why']}" for note in omitted)
    if share < 1.0:
        notes += f"; snapshots of {share:.2%} of the users, drawn by chance: features.max_shoppers"
    fewer = params.cuts.train - sum(c.split is Split.TRAIN for c in cuts)
    if fewer:
        notes += f"; {fewer} of {params.cuts.train} training cuts left out: the log is too short"
    return (
        f"{sequences.events:,} events of {sequences.users:,} users, "
        f"{snapshots.num_rows:,} snapshots at {len(cuts)} cuts, {len(targets)} targets "
        f"in {OUTPUT}{notes}"
    )


def _check_inputs(root: Path) -> None:
    """Fail when a file is missing, unreadable or of another schema; name the file."""
    parts = sorted((root / EVENTS).glob("*/*.parquet"))
    if not parts:
        raise UserError(f"{root / EVENTS}: no events; run the stages before")
    profiles = root / PROFILES
    if not profiles.exists():
        raise UserError(f"{profiles}: no such file; run the stages before")
    for path in [*parts, profiles]:
        schema = USER_SCHEMA if path == profiles else EVENT_SCHEMA
        try:
            names = pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        check_columns(names, schema, str(path))


def _find_span(connection: Any, events: Any) -> tuple[datetime, datetime]:
    """Time of the first and the last event; fails on amounts that no exact sum can hold."""
    amount = _.price.fill_null(0.0) * _.quantity.fill_null(1.0)
    largest = {"price": _.price.abs().max(), "price x quantity": amount.abs().max()}
    us = microseconds(connection, _.ts)
    found = events.aggregate(first=us.min(), last=us.max(), **largest).to_pyarrow()
    row = found.to_pylist()[0]
    if row["first"] is None:
        raise UserError(f"{EVENTS}: no events")
    for name in largest:
        if row[name] is not None and row[name] > MAX_AMOUNT:
            raise UserError(f"{EVENTS}: {name} reaches {row[name]:g}, more than {MAX_AMOUNT:g}")
    # Whole microseconds, as Spark's times come without their zone.
    start = datetime(1970, 1, 1, tzinfo=UTC)
    first, last = (start + timedelta(microseconds=row[name]) for name in ("first", "last"))
    return first, last


def _tidy_people(people: pa.Table) -> pa.Table:
    fields = [pa.field("user", pa.int32(), nullable=False), *USER_SCHEMA]
    return pa.table(
        [people[f.name].cast(f.type).combine_chunks() for f in fields], schema=pa.schema(fields)
    )


def _collect_snapshots(
    params: Params,
    events: Any,
    sequences: Sequences,
    cuts: Sequence[Cut],
    targets: Sequence[Target],
    vocabulary: dict[str, list[int]],
) -> pa.Table:
    """user, cut, f_..., y_..., sorted by cut, then user."""
    features = build_snapshots(
        events,
        cuts=cuts,
        windows_days=params.features.windows_days,
        active_within_days=params.population.active_within_days,
        predicted_types=[t.event for t in targets if t.event],
    )
    with features.cache() as population:
        labels = build_labels(events, population, cuts=cuts, targets=targets)
        known = _tidy(population.order_by("cut", "user").to_pyarrow())
        ahead = _tidy(labels.order_by("cut", "user").to_pyarrow())
    cut_us = np.array([c.us for c in cuts], dtype=np.int64)
    profiles = profile_features(
        sequences,
        vocabulary,
        user=known["user"].to_numpy(),
        cut_us=cut_us[known["cut"].to_numpy()],
    )
    columns = dict(zip(known.column_names, known.columns, strict=True))
    columns |= dict(zip(profiles.column_names, profiles.columns, strict=True))
    columns |= {n: ahead[n] for n in ahead.column_names if n.startswith("y_")}
    return pa.table(columns)


def _tidy(table: pa.Table) -> pa.Table:
    """Keys first, then float64 with NaN for unknown, whatever the engine made of them."""
    keys = {n: table[n].cast(pa.int32()).combine_chunks() for n in ("user", "cut")}
    values = {
        n: table[n].cast(pa.float64()).fill_null(float("nan")).combine_chunks()
        for n in table.column_names
        if n not in keys
    }
    return pa.table(keys | values)


def _check_population(
    snapshots: pa.Table, cuts: Sequence[Cut], active_within_days: float | None
) -> None:
    """Fail when a kind of cut has nobody to learn from or to be judged on."""
    found = set(snapshots["cut"].to_pylist())
    for split in (Split.TRAIN, Split.CALIBRATION, Split.TEST):
        of_kind = [c for c in cuts if c.split is split]
        if not any(c.index in found for c in of_kind):
            raise UserError(
                f"nobody was active in the {active_within_days} days before the {split} cut of "
                f"{of_kind[-1].ts:%Y-%m-%d}: raise population.active_within_days (null: everybody)"
            )


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
