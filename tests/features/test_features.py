"""Snapshot features, labels and sequences against plain Python on a small random log."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.config import Params, parse_params
from pipelines.errors import UserError
from pipelines.events import EVENT_CODES, EVENT_SCHEMA, EVENT_TYPES, TIMESTAMP, USER_SCHEMA
from pipelines.features.store import Sequences, encode_events, hash_text
from pipelines.io import digest_directory, read_json, write_table
from pipelines.stages.features import run

START = datetime(2025, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
SETTINGS: dict[str, Any] = {
    "targets": {"horizons_days": [3, 7], "primary_horizon_days": 7},
    "cuts": {"train": 2},
}
ACTIVE = 28 * DAY
Row = dict[str, Any]


def make_log(users: int = 12, days: int = 40, seed: int = 1) -> list[Row]:
    chance = random.Random(seed)
    rows = []
    for user in range(users):
        ts = START
        for n in range(chance.randrange(1, 60)):
            # Some events share an instant, some a day, so that ties and sessions are met.
            if chance.random() < 0.6:
                ts = START + timedelta(microseconds=chance.randrange(days * 86_400_000_000))
            elif chance.random() < 0.5:
                ts = min(
                    ts + timedelta(minutes=chance.randrange(60)), START + days * DAY - 2 * SECOND
                )
            kind = chance.choice([*EVENT_TYPES, "purchase", "view"])
            has_item = kind != "search"
            rows.append(
                {
                    "event_id": f"e{user}-{n}",
                    "user_id": f"u{user}",
                    "ts": ts,
                    "event_type": kind,
                    "item_id": f"i{chance.randrange(9)}" if has_item else None,
                    "category": chance.choice(["a", "b", "c", None]) if has_item else None,
                    "brand": chance.choice(["x", None]),
                    "price": chance.choice([None, round(chance.uniform(1, 90), 2)]),
                    "quantity": chance.choice([None, 1.0, 2.0, 0.5]),
                    "query": None if has_item else chance.choice(["red shoes", "Lamp", "gift"]),
                    "session_id": chance.choice([None, "s1", "s2"]),
                }
            )
    # The first and the last day are known, so that the cuts are.
    rows[0]["ts"], rows[-1]["ts"] = START, START + days * DAY - SECOND
    return rows


def write_log(
    root: Path,
    rows: list[Row],
    people: list[Row] | None = None,
    extra: pa.Table | None = None,
) -> None:
    events = pa.Table.from_pylist(rows, schema=EVENT_SCHEMA)
    if extra is not None:
        events = pa.concat_tables([events, extra])
    events = events.sort_by([("ts", "ascending"), ("event_id", "ascending")])
    days = pc.strftime(events["ts"], "%Y-%m-%d")
    for day in pc.unique(days).to_pylist():
        part = events.filter(pc.equal(days, day))
        write_table(root / f"data/valid/day={day}/part-0.parquet", part)
    users = pa.Table.from_pylist(people or [], schema=USER_SCHEMA)
    write_table(root / "data/entities/users.parquet", users)


PEOPLE = [
    {"user_id": "u0", "age": 30.0, "gender": "f", "region": "x", "signup_ts": START - 5 * DAY},
    {"user_id": "u1", "age": None, "gender": None, "region": "y", "signup_ts": None},
    {"user_id": "u2", "age": 41.5, "gender": "m", "region": "x", "signup_ts": START + 30 * DAY},
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
    assert [p["user_id"] for p in people] == sorted({r["user_id"] for r in rows})
    names = read_json(folder / "schema.json")["features"]
    vocabulary = read_json(folder / "vocabulary.json")
    cuts = read_json(folder / "cuts.json")["cuts"]
    found = {
        (row["user"], row["cut"]): row
        for row in pq.read_table(folder / "snapshots.parquet").to_pylist()
    }
    expected_rows = []
    test = datetime.fromisoformat(next(c["ts"] for c in cuts if c["split"] == "test"))
    assert sum(c["split"] == "between" for c in cuts) == 2
    for cut in cuts:
        when = datetime.fromisoformat(cut["ts"])
        for person in people:
            mine = [r for r in rows if r["user_id"] == person["user_id"]]
            past = [r for r in mine if r["ts"] < when]
            past.sort(key=lambda r: (r["ts"], r["event_id"]))
            if not past or when - past[-1]["ts"] > ACTIVE:
                continue
            key = (person["user"], cut["index"])
            expected_rows.append(key)
            expected = count_features(past, when, params) | {
                "f_age": person["age"],
                "f_gender": place(person["gender"], vocabulary["gender"]),
                "f_region": place(person["region"], vocabulary["region"]),
                "f_days_since_signup": (when - person["signup_ts"]) / DAY
                if person["signup_ts"] and person["signup_ts"] <= when
                else None,
            }
            assert sorted(expected) == sorted(names)
            labels = count_labels(mine, when, params, known=test)
            for name, value in (expected | labels).items():
                assert same(found[key][name], value), (key, name, found[key][name], value)
    assert list(found) == [(user, cut) for user, cut in expected_rows]
    assert len(expected_rows) > 20


def same(found: float, expected: float | None) -> bool:
    if expected is None:
        return math.isnan(found)
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-6)


def place(value: str | None, known: list[int]) -> float | None:
    if value is None:
        return None
    code = hash_text(value)
    return known.index(code) + 1 if code in known else 0


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def spread(values: list[float]) -> float | None:
    return statistics.pstdev(values) if len(values) > 1 else None


def amount(rows: list[Row]) -> float:
    bought = [r for r in rows if r["event_type"] == "purchase"]
    return sum((r["price"] or 0) * (1 if r["quantity"] is None else r["quantity"]) for r in bought)


def count_features(past: list[Row], cut: datetime, params: Params) -> dict[str, float | None]:
    """All features of events by their definition, one event at a time."""

    def kinds(rows: list[Row], kind: str) -> int:
        return sum(r["event_type"] == kind for r in rows)

    def days_ago(ts: datetime) -> float:
        return (cut - ts) / DAY

    gaps = [float((b["ts"] - a["ts"]) // SECOND) / 86400 for a, b in pairwise(past)]
    bought = [r for r in past if r["event_type"] == "purchase"]
    buying_days = sorted({r["ts"].date() for r in bought})
    buying_gaps = [float((b - a).days) for a, b in pairwise(buying_days)]
    prices = [r["price"] for r in past if r["price"] is not None]
    opens = [True] + [
        a["session_id"] != b["session_id"]
        if a["session_id"] and b["session_id"]
        else b["ts"] - a["ts"] > timedelta(minutes=30)
        for a, b in pairwise(past)
    ]
    last_buy = max((n for n, r in enumerate(past) if r["event_type"] == "purchase"), default=-1)
    recency, gap = days_ago(past[-1]["ts"]), mean(gaps)
    buying_gap = mean(buying_gaps)
    expected: dict[str, float | None] = {
        "f_recency": recency,
        "f_tenure": days_ago(past[0]["ts"]),
        "f_last_type": EVENT_CODES[past[-1]["event_type"]],
        "f_price_mean": mean(prices),
        "f_price_max": max(prices, default=None),
        "f_gap_last": gaps[-1] if gaps else None,
        "f_gap_mean": gap,
        "f_gap_std": spread(gaps),
        "f_recency_over_gap": recency / max(gap, 0.01) if gap is not None else None,
        "f_purchase_gap_mean": buying_gap,
        "f_purchase_gap_std": spread(buying_gaps),
        "f_purchase_gap_last": buying_gaps[-1] if buying_gaps else None,
        "f_purchase_recency_over_gap": days_ago(bought[-1]["ts"]) / buying_gap
        if buying_gap
        else None,
        "f_purchase_amount_mean": amount(bought) / len(bought) if bought else None,
    }
    for kind in ("view", "search", "add_to_cart"):
        expected[f"f_{kind}_since_purchase"] = kinds(past[last_buy + 1 :], kind)
    for kind in EVENT_TYPES:
        times = [r["ts"] for r in past if r["event_type"] == kind]
        expected[f"f_recency_{kind}"] = days_ago(times[-1]) if times else None
        expected[f"f_{kind}"] = len(times)
    for window in (None, *params.features.windows_days):
        tail = "" if window is None else f"_{window}d"
        marks = [
            (r, start)
            for r, start in zip(past, opens, strict=True)
            if window is None or cut - r["ts"] <= window * DAY
        ]
        inside = [r for r, _ in marks]
        categories = [r["category"] for r in inside if r["category"]]
        top = max((categories.count(c) for c in set(categories)), default=0)
        expected |= {
            f"f_events{tail}": len(inside),
            f"f_sessions{tail}": sum(start for _, start in marks),
            # Cuts and windows are whole days here, so that no day is cut in two.
            f"f_days_active{tail}": len({r["ts"].date() for r in inside}),
            f"f_spend{tail}": amount(inside),
            f"f_items{tail}": len({r["item_id"] for r in inside} - {None}),
            f"f_categories{tail}": len(set(categories)),
            f"f_top_category_share{tail}": top / len(categories) if categories else None,
        }
        for kind in ("view", "search", "add_to_cart", "purchase"):
            expected[f"f_{kind}{tail}"] = kinds(inside, kind)
    return expected


def count_labels(
    mine: list[Row], cut: datetime, params: Params, *, known: datetime
) -> dict[str, float | None]:
    """All labels by their definition; None of windows before the test that close in it."""
    labels: dict[str, float | None] = {}
    for horizon in params.targets.horizons_days:
        names = [f"y_{what}_{horizon}d" for what in ("purchase", "search", "churn", "spend")]
        if cut < known < cut + horizon * DAY:
            labels |= dict.fromkeys(names)
            continue
        ahead = [r for r in mine if cut <= r["ts"] < cut + horizon * DAY]
        bought = [r for r in ahead if r["event_type"] == "purchase"]
        labels |= {
            f"y_purchase_{horizon}d": bool(bought),
            f"y_search_{horizon}d": any(r["event_type"] == "search" for r in ahead),
            f"y_churn_{horizon}d": not ahead,
            f"y_spend_{horizon}d": amount(bought),
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


@pytest.mark.parametrize(
    ("event_type", "quantity", "becomes", "counts"),
    [
        ("purchase", -2.0, "refund", 2.0),
        ("purchase", 2.0, "purchase", 2.0),
        ("purchase", None, "purchase", None),
        ("refund", -1.0, "refund", 1.0),
        ("add_to_cart", -1.0, "add_to_cart", -1.0),
    ],
)
def test_what_comes_back_is_a_refund_to_the_service_as_to_ingest(
    event_type: str, quantity: float | None, becomes: str, counts: float | None
) -> None:
    event = {"ts": 1_700_000_000_000_000, "event_type": event_type, "quantity": quantity}
    encoded = encode_events([[event]])
    assert encoded.type.tolist() == [EVENT_CODES[becomes]]
    np.testing.assert_array_equal(encoded.quantity, [np.nan if counts is None else counts])


def test_events_may_be_objects_or_dicts_or_some_of_each() -> None:
    def make(user: str, number: int) -> dict[str, Any]:
        ts = START + timedelta(hours=1) * (number * 7 % 5)
        event = {"event_id": f"{user}{number}", "event_type": "view", "ts": ts}
        return event | ({"item_id": f"i{number}", "query": "red shoes"} if number % 2 else {})

    dicts = [[make(user, number) for number in range(6)] for user in "abc"]
    nothing = dict.fromkeys(EVENT_SCHEMA.names)
    objects = [[SimpleNamespace(**nothing | event) for event in events] for events in dicts]
    expected = encode_events(dicts)
    assert expected.ts[0] == min(expected.ts) and expected.item.any()
    for users in (objects, [dicts[0], objects[1], dicts[2]], [objects[0], dicts[1], dicts[2]]):
        encoded = encode_events(users)
        for field in fields(Sequences):
            np.testing.assert_array_equal(
                getattr(expected, field.name), getattr(encoded, field.name), field.name
            )


def test_twice_gives_the_same_bytes(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path
) -> None:
    folder, rows = built
    write_log(tmp_path, rows, PEOPLE)
    run(params, tmp_path)
    assert digest_directory(tmp_path / "data/features") == digest_directory(folder)


@pytest.mark.parametrize("change", ["altered", "removed"])
def test_nothing_sees_past_its_cut(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path, change: str
) -> None:
    folder, rows = built
    cuts = read_json(folder / "cuts.json")["cuts"]
    calibration = next(c for c in cuts if c["split"] == "calibration")
    when = datetime.fromisoformat(calibration["ts"])
    # The last event stays, as the end of the data fixes the cuts.
    past = [r for r in rows if r["ts"] < when]
    later = [r for r in rows[:-1] if r["ts"] >= when]
    new = {"category": "new", "brand": "new", "item_id": "new", "price": 5000.0, "quantity": 9.0}
    altered = [r | new | {"ts": min(r["ts"] + DAY, rows[-1]["ts"])} for r in later]
    write_log(tmp_path, [*past, *(altered if change == "altered" else []), rows[-1]], PEOPLE)
    run(params, tmp_path)
    other = tmp_path / "data/features"
    assert read_json(other / "cuts.json") == read_json(folder / "cuts.json")
    assert read_json(other / "vocabulary.json") == read_json(folder / "vocabulary.json")
    assert read_json(other / "scalers.json") == read_json(folder / "scalers.json")
    before, after = (
        pq.read_table(p / "snapshots.parquet", filters=[("cut", "<=", calibration["index"])])
        for p in (folder, other)
    )
    users = [pq.read_table(p / "users.parquet")["user_id"].to_numpy() for p in (folder, other)]
    np.testing.assert_array_equal(users[0][before["user"]], users[1][after["user"]])
    names = ["cut", *read_json(folder / "schema.json")["features"]]
    assert before.num_rows > 10
    for name in names:
        np.testing.assert_array_equal(before[name].to_numpy(), after[name].to_numpy(), name)


def test_no_label_before_the_test_cut_sees_past_it(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path
) -> None:
    folder, rows = built
    cuts = read_json(folder / "cuts.json")["cuts"]
    test = next(c for c in cuts if c["split"] == "test")
    when = datetime.fromisoformat(test["ts"])
    write_log(tmp_path, [r for r in rows if r["ts"] < when] + [rows[-1]], PEOPLE)
    run(params, tmp_path)
    other = tmp_path / "data/features"
    assert read_json(other / "cuts.json") == read_json(folder / "cuts.json")
    before, after = (
        pq.read_table(p / "snapshots.parquet", filters=[("cut", "<", test["index"])])
        for p in (folder, other)
    )
    labels = [name for name in before.column_names if name.startswith("y_")]
    assert np.isnan(before["y_purchase_7d"].to_numpy()).any()
    assert np.isfinite(before["y_purchase_3d"].to_numpy()).all()
    for name in labels:
        np.testing.assert_array_equal(before[name].to_numpy(), after[name].to_numpy(), name)


def test_the_vocabulary_is_of_the_past_and_by_frequency(
    built: tuple[Path, list[Row]],
) -> None:
    folder, rows = built
    cuts = read_json(folder / "cuts.json")["cuts"]
    when = datetime.fromisoformat(next(c["ts"] for c in cuts if c["split"] == "calibration"))
    past = [r["category"] for r in rows if r["ts"] < when and r["category"]]
    expected = sorted(set(past), key=lambda c: (-past.count(c), hash_text(c)))
    vocabulary = read_json(folder / "vocabulary.json")
    assert vocabulary["category"] == [hash_text(c) for c in expected]
    # "nobody" has a profile and no event.
    assert hash_text("z") not in vocabulary["region"]
    ages = [p["age"] for p in PEOPLE if p["age"] and p["user_id"] != "nobody"]
    assert read_json(folder / "scalers.json")["age"]["mean"] == pytest.approx(sum(ages) / len(ages))


def without(kind: str) -> list[Row]:
    rows = [r for r in make_log() if r["event_type"] != kind]
    rows[0]["ts"], rows[-1]["ts"] = START, START + 40 * DAY - SECOND
    return rows


def test_a_target_without_events_is_left_out_with_a_note(params: Params, tmp_path: Path) -> None:
    write_log(tmp_path, without("search"))
    assert "search_7d left out: no search" in run(params, tmp_path)
    schema = read_json(tmp_path / "data/features/schema.json")
    assert {n["name"] for n in schema["omitted"]} == {"search_3d", "search_7d"}
    assert "purchase_7d" in {t["name"] for t in schema["targets"]}
    names = pq.read_schema(tmp_path / "data/features/snapshots.parquet").names
    assert not [n for n in names if n.startswith("y_search")]


def test_training_cuts_that_a_short_log_lacks_are_told(params: Params, tmp_path: Path) -> None:
    write_log(tmp_path, make_log())
    cuts = params.cuts.model_copy(update={"train": 50})
    told = run(params.model_copy(update={"cuts": cuts}), tmp_path)
    assert "of 50 training cuts left out: the log is too short" in told


def test_no_purchases_leave_search_and_churn(params: Params, tmp_path: Path) -> None:
    write_log(tmp_path, without("purchase"))
    run(params, tmp_path)
    schema = read_json(tmp_path / "data/features/schema.json")
    assert {n["name"].split("_")[0] for n in schema["omitted"]} == {"purchase", "spend"}
    assert "search_7d" in {t["name"] for t in schema["targets"]}


def test_no_target_left_is_a_clear_mistake(tmp_path: Path) -> None:
    write_log(tmp_path, without("purchase"))
    targets = SETTINGS["targets"] | {"events": ["purchase"], "churn": False}
    with pytest.raises(UserError, match=r"no target can be learnt.*no purchase"):
        run(parse_params(SETTINGS | {"targets": targets}), tmp_path)
    assert not (tmp_path / "data/features").exists()


def test_an_event_type_that_is_predicted_is_counted_in_windows(tmp_path: Path) -> None:
    write_log(tmp_path, make_log())
    targets = SETTINGS["targets"] | {"events": ["review"]}
    run(parse_params(SETTINGS | {"targets": targets}), tmp_path)
    schema = read_json(tmp_path / "data/features/schema.json")
    assert "f_review_7d" in schema["features"]
    assert "review_7d" in {t["name"] for t in schema["targets"]}


def test_an_event_at_the_very_instant_is_on_the_right_side_of_it(tmp_path: Path) -> None:
    cut = START + 33 * DAY  # a week before the end
    bought = {"event_type": "purchase", "item_id": "i", "price": 8.0, "quantity": 1.0}
    seen = {"event_type": "view", "item_id": "i"}
    told = [
        ("at", cut - DAY, seen),
        ("at", cut, bought),
        ("close", cut - DAY, seen),
        ("close", cut + 3 * DAY, bought),
        ("left", cut - ACTIVE, seen),
        ("gone", cut - ACTIVE - timedelta(microseconds=1), seen),
        ("week", cut - 7 * DAY, seen),
        ("signed", cut - DAY, seen),
    ]
    rows = [
        {"event_id": f"x{n}", "user_id": user, "ts": ts, **what}
        for n, (user, ts, what) in enumerate(told)
    ]
    people = [{"user_id": "signed", "signup_ts": cut}]
    write_log(tmp_path, make_log() + rows, people)
    run(parse_params(SETTINGS | {"features": {"windows_days": [7, 28]}}), tmp_path)
    folder = tmp_path / "data/features"
    users = [p["user_id"] for p in pq.read_table(folder / "users.parquet").to_pylist()]
    (test,) = (c for c in read_json(folder / "cuts.json")["cuts"] if c["split"] == "test")
    assert datetime.fromisoformat(test["ts"]) == cut
    table = pq.read_table(folder / "snapshots.parquet").to_pylist()
    found = {users[row["user"]]: row for row in table if row["cut"] == test["index"]}
    assert "gone" not in found
    assert (found["left"]["f_recency"], found["left"]["f_events_28d"]) == (28, 1)
    assert (found["week"]["f_events_7d"], found["week"]["f_events_28d"]) == (1, 1)
    assert (found["at"]["f_purchase"], found["at"]["f_events"]) == (0, 1)
    assert found["at"]["f_view_since_purchase"] == 1
    assert (found["at"]["y_purchase_3d"], found["at"]["y_churn_3d"]) == (1, 0)
    assert (found["close"]["y_purchase_3d"], found["close"]["y_churn_3d"]) == (0, 1)
    assert found["close"]["y_purchase_7d"] == 1
    assert (found["at"]["y_spend_3d"], found["close"]["y_spend_3d"]) == (8, 0)
    assert found["signed"]["f_days_since_signup"] == 0


def test_everybody_seen_is_the_population_without_a_limit(tmp_path: Path) -> None:
    write_log(tmp_path, make_log())
    run(parse_params(SETTINGS | {"population": {"active_within_days": None}}), tmp_path)
    snapshots = pq.read_table(tmp_path / "data/features/snapshots.parquet")
    offsets = Sequences.load(tmp_path / "data/features/sequences").offsets
    last = max(snapshots["cut"].to_pylist())
    assert snapshots.filter(pc.field("cut") == last).num_rows == len(offsets) - 1


def test_of_many_shoppers_some_stand_for_all(
    built: tuple[Path, list[Row]], params: Params, tmp_path: Path
) -> None:
    whole, rows = built
    write_log(tmp_path, rows, PEOPLE)
    few = params.features.model_copy(update={"max_shoppers": 5})
    told = run(params.model_copy(update={"features": few}), tmp_path)
    some = tmp_path / "data/features"
    share = read_json(some / "schema.json")["share_of_shoppers"]
    assert read_json(whole / "schema.json")["share_of_shoppers"] == 1.0
    assert 0 < share < 1
    assert f"{share:.2%} of the users" in told
    every = pq.read_table(whole / "snapshots.parquet")
    largest = max(row["counts"] for row in every["cut"].value_counts().to_pylist())
    assert share == 5 / largest
    drawn = pq.read_table(some / "snapshots.parquet")
    users = np.unique(drawn["user"].to_numpy())
    assert 0 < len(users) < len(np.unique(every["user"].to_numpy()))
    # Of them, everything is as it was; and what the network reads holds everybody.
    kept = every.filter(pc.is_in(every["user"], value_set=pa.array(users)))
    # So few may leave a target with one outcome, which is left out.
    for name in drawn.column_names:
        np.testing.assert_array_equal(drawn[name], kept[name], err_msg=name)
    assert digest_directory(some / "sequences") == digest_directory(whole / "sequences")
    assert {path.name for path in some.iterdir()} == {path.name for path in whole.iterdir()}


def test_nobody_active_before_a_cut_is_a_clear_mistake(tmp_path: Path) -> None:
    rows = [r for r in make_log() if r["ts"] < START + 5 * DAY] + [make_log()[-1]]
    write_log(tmp_path, rows)
    with pytest.raises(UserError, match=r"nobody was active.*population\.active_within_days"):
        run(parse_params(SETTINGS | {"population": {"active_within_days": 3}}), tmp_path)


def test_one_user_with_100_000_events_costs_no_more_than_many(
    params: Params, tmp_path: Path
) -> None:
    count = 100_000
    rows = make_log()
    step = 39 * DAY / count
    events = pa.table(
        {
            "event_id": [f"h{n:06}" for n in range(count)],
            "user_id": ["heavy"] * count,
            "ts": pa.array([START + n * step for n in range(count)], TIMESTAMP),
            "event_type": ["view", "view", "search", "purchase"] * (count // 4),
            "item_id": [f"i{n % 5000}" for n in range(count)],
            "category": ["a", "b"] * (count // 2),
            "brand": pa.nulls(count, pa.string()),
            "price": [0.1] * count,
            "quantity": [3.0] * count,
            "query": pa.nulls(count, pa.string()),
            "session_id": pa.nulls(count, pa.string()),
        }
    ).cast(EVENT_SCHEMA)
    write_log(tmp_path, rows, extra=events)
    run(params, tmp_path)
    cuts = read_json(tmp_path / "data/features/cuts.json")["cuts"]
    when = datetime.fromisoformat(cuts[-1]["ts"])
    past = -((when - START) // -step)
    snapshot = pq.read_table(
        tmp_path / "data/features/snapshots.parquet",
        filters=[("user", "=", 0), ("cut", "=", cuts[-1]["index"])],
    ).to_pylist()[0]
    assert snapshot["f_events"] == past
    # The sum of so many tenths is exact, as it is one of integers.
    assert snapshot["f_spend"] == round(past // 4 * 0.3, 4)
    assert Sequences.load(tmp_path / "data/features/sequences").offsets[1] == count


def test_no_events_are_a_clear_mistake(params: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data/valid"):
        run(params, tmp_path)


def test_a_damaged_part_is_named(params: Params, tmp_path: Path) -> None:
    write_log(tmp_path, make_log())
    part = next((tmp_path / "data/valid").glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{part.parent.name}.*not a readable Parquet file"):
        run(params, tmp_path)


def test_what_a_killed_build_spilled_goes_and_so_does_its_own(
    params: Params, tmp_path: Path
) -> None:
    """In the project: temporary files are memory on many systems."""
    write_log(tmp_path, make_log())
    left = tmp_path / "data/.features.spill/duckdb_temp_storage-0.tmp"
    left.parent.mkdir()
    left.touch()
    run(params, tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "entities",
        "features",
        "valid",
    ]


def test_an_amount_beyond_exact_sums_is_refused(params: Params, tmp_path: Path) -> None:
    rows = make_log()
    rows[3]["price"] = 1e300
    write_log(tmp_path, rows)
    with pytest.raises(UserError, match=r"price reaches 1e\+300"):
        run(params, tmp_path)
