"""Snapshot features, labels and sequences against plain Python on a small random log."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Params, parse_params
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, EVENT_TYPES, USER_SCHEMA
from pipelines.features.store import Sequences, encode_events
from pipelines.io import digest_directory, read_json, write_table
from pipelines.stages.features import run

START = datetime(2025, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
SETTINGS = {"targets": {"horizons_days": [3, 7], "primary_horizon_days": 7}, "cuts": {"train": 2}}
Row = dict[str, Any]


def make_log(users: int = 12, days: int = 40, seed: int = 1) -> list[Row]:
    chance = random.Random(seed)
    rows = []
    for user in range(users):
        for n in range(chance.randrange(1, 60)):
            kind = chance.choice(EVENT_TYPES)
            has_item = kind != "search"
            rows.append(
                {
                    "event_id": f"e{user}-{n}",
                    "user_id": f"u{user}",
                    "ts": START + chance.random() * days * DAY,
                    "event_type": kind,
                    "item_id": f"i{chance.randrange(9)}" if has_item else None,
                    "category": chance.choice(["a", "b", None]) if has_item else None,
                    "brand": None,
                    "price": round(chance.uniform(1, 90), 2) if has_item else None,
                    "quantity": chance.choice([None, 1.0, 2.0]),
                    "query": None if has_item else chance.choice(["red shoes", "Lamp", "gift"]),
                    "session_id": chance.choice([None, "s1", "s2"]),
                }
            )
    for row in rows:
        row["ts"] = row["ts"].replace(microsecond=row["ts"].microsecond)
    # The first and the last day are known, so that the cuts are.
    rows[0]["ts"], rows[-1]["ts"] = START, START + days * DAY - timedelta(seconds=1)
    return rows


def write_log(root: Path, rows: list[Row], people: list[Row] | None = None) -> None:
    events = pa.Table.from_pylist(rows, schema=EVENT_SCHEMA)
    events = events.sort_by([("ts", "ascending"), ("event_id", "ascending")])
    days = [ts.date().isoformat() for ts in events["ts"].to_pylist()]
    for day in sorted(set(days)):
        part = events.filter(pa.array([d == day for d in days]))
        write_table(root / f"data/valid/day={day}/part-0.parquet", part)
    users = pa.Table.from_pylist(people or [], schema=USER_SCHEMA)
    write_table(root / "data/entities/users.parquet", users)


PEOPLE = [
    {"user_id": "u0", "age": 30.0, "gender": "f", "region": "x", "signup_ts": START - 5 * DAY},
    {"user_id": "u1", "age": None, "gender": None, "region": "y", "signup_ts": None},
    {"user_id": "nobody", "age": 99.0, "gender": "m", "region": "z", "signup_ts": START},
]


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(SETTINGS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, params: Params) -> tuple[Path, list[Row]]:
    root = tmp_path_factory.mktemp("features")
    rows = make_log()
    write_log(root, rows, PEOPLE)
    run(params, root)
    return root / "data/features", rows


def test_features_and_labels_equal_a_brute_force_count(
    built: tuple[Path, list[Row]], params: Params
) -> None:
    folder, rows = built
    people = pq.read_table(folder / "users.parquet").to_pylist()
    cuts = {
        c["index"]: datetime.fromisoformat(c["ts"]) for c in read_json(folder / "cuts.json")["cuts"]
    }
    snapshots = pq.read_table(folder / "snapshots.parquet").to_pylist()
    expected_rows = 0
    for index, cut in cuts.items():
        for person in people:
            mine = [r for r in rows if r["user_id"] == person["user_id"]]
            past = sorted(
                (r for r in mine if r["ts"] < cut), key=lambda r: (r["ts"], r["event_id"])
            )
            if not past or cut - past[-1]["ts"] > 28 * DAY:
                continue
            expected_rows += 1
            found = next(s for s in snapshots if (s["user"], s["cut"]) == (person["user"], index))
            for name, value in count_features(past, cut).items():
                assert same(found[name], value), (name, found[name], value)
            for name, value in count_labels(mine, cut, params).items():
                assert same(found[name], value), (name, found[name], value)
    assert expected_rows == len(snapshots)


def same(found: float | None, expected: float | None) -> bool:
    if expected is None:
        return found is None or math.isnan(found)
    return found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)


def count_features(past: list[Row], cut: datetime) -> dict[str, float | None]:
    def days(ts: datetime) -> float:
        return (cut - ts) / DAY

    def amount(rows: list[Row]) -> float:
        bought = (r for r in rows if r["event_type"] == "purchase")
        return sum(round((r["price"] or 0) * (r["quantity"] or 1) * 100) / 100 for r in bought)

    gaps = [(b["ts"] - a["ts"]).total_seconds() for a, b in pairwise(past)]
    gaps = [math.floor(g) / 86400 for g in gaps]
    bought = [r for r in past if r["event_type"] == "purchase"]
    buys = [days(a["ts"]) - days(b["ts"]) for a, b in pairwise(bought)]
    prices = [r["price"] for r in past if r["price"] is not None]
    starts = [True] + [
        a["session_id"] != b["session_id"]
        if a["session_id"] and b["session_id"]
        else b["ts"] - a["ts"] > timedelta(minutes=30)
        for a, b in pairwise(past)
    ]
    last_buy = bought[-1]["ts"] if bought else None
    since = [r for r in past if last_buy is None or r["ts"] > last_buy]
    expected: dict[str, float | None] = {
        "f_recency": days(past[-1]["ts"]),
        "f_tenure": days(past[0]["ts"]),
        "f_events": len(past),
        "f_sessions": sum(starts),
        "f_spend": amount(past),
        "f_items": len({r["item_id"] for r in past} - {None}),
        "f_price_mean": sum(prices) / len(prices) if prices else None,
        "f_price_max": max(prices) if prices else None,
        "f_gap_last": gaps[-1] if gaps else None,
        "f_gap_mean": sum(gaps) / len(gaps) if gaps else None,
        "f_purchase_gap_last": round(buys[-1], 3) if buys else None,
        "f_search_since_purchase": sum(r["event_type"] == "search" for r in since)
        if since
        else None,
    }
    for window in (1, 7, 28):
        inside = [r for r in past if cut - r["ts"] <= window * DAY]
        in_window = [s for s, r in zip(starts, past, strict=True) if cut - r["ts"] <= window * DAY]
        categories = [r["category"] for r in inside if r["category"]]
        top = max((categories.count(c) for c in set(categories)), default=0)
        expected |= {
            f"f_events_{window}d": len(inside),
            f"f_sessions_{window}d": sum(in_window),
            f"f_spend_{window}d": amount(inside),
            f"f_view_{window}d": sum(r["event_type"] == "view" for r in inside),
            f"f_purchase_{window}d": sum(r["event_type"] == "purchase" for r in inside),
            f"f_top_category_share_{window}d": top / len(categories) if categories else None,
        }
    for kind in EVENT_TYPES:
        times = [r["ts"] for r in past if r["event_type"] == kind]
        expected[f"f_recency_{kind}"] = days(times[-1]) if times else None
        expected[f"f_{kind}"] = len(times)
    return expected


def count_labels(mine: list[Row], cut: datetime, params: Params) -> dict[str, float]:
    labels: dict[str, float] = {}
    for horizon in params.targets.horizons_days:
        ahead = [r for r in mine if cut <= r["ts"] < cut + horizon * DAY]
        bought = [r for r in ahead if r["event_type"] == "purchase"]
        labels |= {
            f"y_purchase_{horizon}d": bool(bought),
            f"y_search_{horizon}d": any(r["event_type"] == "search" for r in ahead),
            f"y_churn_{horizon}d": not ahead,
            f"y_spend_{horizon}d": sum(
                round((r["price"] or 0) * (r["quantity"] or 1) * 100) / 100 for r in bought
            ),
        }
    return labels


def test_the_service_encodes_a_history_as_the_stage_does(built: tuple[Path, list[Row]]) -> None:
    folder, rows = built
    stored = Sequences.load(folder / "sequences")
    people = pq.read_table(folder / "users.parquet").to_pylist()
    encoded = encode_events(
        [[r for r in rows if r["user_id"] == p["user_id"]] for p in people], people
    )
    for name in ("offsets", "ts", "type", "item", "category", "brand", "session_start"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(encoded, name), name)
    for name in ("price", "quantity", "age", "gender", "region", "signup_ts"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(encoded, name), name)
    for event in range(stored.events):
        a, b = int(stored.query[event]), int(encoded.query[event])
        np.testing.assert_array_equal(
            stored.query_tokens[stored.query_offsets[a] : stored.query_offsets[a + 1]],
            encoded.query_tokens[encoded.query_offsets[b] : encoded.query_offsets[b + 1]],
        )


def test_twice_gives_the_same_bytes(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path
) -> None:
    folder, rows = built
    write_log(tmp_path, rows, PEOPLE)
    run(params, tmp_path)
    assert digest_directory(tmp_path / "data/features") == digest_directory(folder)


def test_nothing_sees_past_its_cut(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path
) -> None:
    folder, rows = built
    cuts = read_json(folder / "cuts.json")["cuts"]
    calibration = next(c for c in cuts if c["split"] == "calibration")
    when = datetime.fromisoformat(calibration["ts"])
    last = rows[-1]["event_id"]
    changed = [
        r | {"category": "new", "price": 5000.0} if r["ts"] >= when and r["event_id"] != last else r
        for r in rows
    ]
    write_log(tmp_path, changed, PEOPLE)
    run(params, tmp_path)
    other = tmp_path / "data/features"
    assert read_json(other / "vocabulary.json") == read_json(folder / "vocabulary.json")
    assert read_json(other / "scalers.json") == read_json(folder / "scalers.json")
    before, after = (
        pq.read_table(p / "snapshots.parquet", filters=[("cut", "<=", calibration["index"])])
        for p in (folder, other)
    )
    names = [n for n in before.column_names if not n.startswith("y_")]
    assert before.select(names).equals(after.select(names))


def test_a_target_without_events_is_left_out_with_a_note(params: Params, tmp_path: Path) -> None:
    rows = [r for r in make_log() if r["event_type"] != "search"]
    rows[0]["ts"], rows[-1]["ts"] = START, START + 40 * DAY - timedelta(seconds=1)
    write_log(tmp_path, rows)
    assert "search_7d left out: no search" in run(params, tmp_path)
    schema = read_json(tmp_path / "data/features/schema.json")
    assert {n["name"] for n in schema["omitted"]} == {"search_3d", "search_7d"}
    assert "purchase_7d" in {t["name"] for t in schema["targets"]}


def test_no_events_are_a_clear_mistake(params: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data/valid"):
        run(params, tmp_path)
