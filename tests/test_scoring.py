"""Scoring everyone: chunks, times, what a killed run leaves, and the files for people."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import scoring
from pipelines.config import Which
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES, USER_SCHEMA, to_us
from pipelines.features.store import Sequences, encode_events, hash_text
from pipelines.io import (
    digest_directory,
    guard_cells,
    read_json,
    say_count,
    write_json,
    write_table,
    write_text,
)
from pipelines.model.calibration import Calibration
from pipelines.model.heads import Heads, Target
from pipelines.model.network import Network, NetworkConfig
from pipelines.model.predictor import ModelSpec, Predictor
from pipelines.model.timeline import Timeline, feature_names
from pipelines.model.tokens import Vocabulary

END = datetime(2025, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
ITEMS = tuple(f"i{n}" for n in range(8))
TARGETS = (
    Target(name="purchase_14d", kind="binary", event="purchase", horizon_days=14),
    Target(name="spend_14d", kind="amount", event="purchase", horizon_days=14),
)


def make_predictor() -> Predictor:
    import torch

    torch.manual_seed(1)
    heads = Heads.for_targets(TARGETS)
    config = NetworkConfig(
        backbone="gpt", width=16, layers=1, heads=2, dropout=0.0, types=len(EVENT_TYPES) + 2,
        categories=2, brands=2, genders=2, regions=2, item_buckets=16, query_buckets=16,
        next_codes=32, features=len(feature_names()), fusion_width=16, events=len(heads.events),
        bins=len(heads.grid), amounts=len(heads.amounts), items=len(ITEMS),
    )  # fmt: skip
    spec = ModelSpec(
        network=config, heads=heads, targets=TARGETS, context=16,
        calibration=Calibration(), thresholds={"purchase_14d": 0.5},
        vocabulary=Vocabulary(item=tuple(hash_text(i) for i in ITEMS), item_id=ITEMS),
    )  # fmt: skip
    return Predictor(spec, Network(config))


def make_project(folder: Path) -> Path:
    """A project with seven shoppers; the first was last seen long ago, the last only lately."""
    rng = np.random.default_rng(1)
    histories: list[list[dict[str, Any]]] = [[{"ts": END - 50 * DAY, "event_type": "view"}]]
    for _ in range(5):
        ages = rng.integers(60, 60 * 24 * 55, int(rng.integers(2, 30)))
        histories.append(
            [
                {"ts": END - timedelta(minutes=int(a)), "event_type": "view", "price": 3.0}
                for a in ages
            ]
        )
    histories.append([{"ts": END - DAY, "event_type": "purchase", "price": 9.0}])
    features = folder / "data/features"
    (features / "sequences").mkdir(parents=True)
    encode_events(histories).save(features / "sequences")
    names = ["=cmd()", *(f"u{i}" for i in range(5)), "zoë, <b>"]
    people = pa.table(
        {
            "user": pa.array(range(7), pa.int32()),
            "user_id": names,
            "age": [30.0] * 7,
            "gender": [None] * 7,
            "region": ["north", None] * 3 + ["south"],
            "signup_ts": [None] * 7,
        },
        schema=pa.schema([pa.field("user", pa.int32()), *USER_SCHEMA]),
    )
    write_table(features / "users.parquet", people)
    first = END - 55 * DAY
    write_json(features / "cuts.json", {"first_ts": first.isoformat(), "end_ts": END.isoformat()})
    write_json(features / "schema.json", {"population_active_within_days": 28})
    write_json(features / "vocabulary.json", {"item": [hash_text(item) for item in ITEMS]})
    (folder / "models/gpt").mkdir(parents=True)
    make_predictor().save(folder / "models/gpt")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_USERS", 2)


def test_chunks_cover_all_users_and_keep_their_bounds() -> None:
    offsets = np.cumsum([0, 3, 3, 100, 1, 1, 1, 1])
    chunks = scoring.plan_chunks(offsets, users=3, events=6)
    assert chunks == [(0, 2), (2, 3), (3, 6), (6, 7)]


def test_scores_are_the_models_predictions(root: Path, small_chunks: None) -> None:
    message = scoring.score(root)
    assert "7 shoppers" in message
    found = pq.read_table(root / "data/scores")
    everyone = Sequences.load(root / "data/features/sequences")
    expected = Predictor.load(root / "models/gpt").predict(
        everyone, np.full(7, to_us(END), dtype=np.int64)
    )
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].to_numpy(), values, rtol=1e-5, atol=1e-7)
    predictor = Predictor.load(root / "models/gpt")
    timeline = Timeline(everyone)
    cuts = timeline.cuts(np.arange(7), np.full(7, to_us(END), dtype=np.int64))
    ahead = predictor.look_ahead(timeline, cuts, 5)
    codes, chances = ahead.items, ahead.chances
    assert found["next_items"].to_pylist() == [[ITEMS[c] for c in row] for row in codes]
    np.testing.assert_allclose(found["next_item_chances"].to_pylist(), chances, rtol=1e-4)
    days = predictor.days_until(predictor.raw(timeline, cuts), "purchase")
    for ts, ahead in zip(found["next_purchase_ts"].to_pylist(), days, strict=True):
        assert (ts is None) == bool(np.isnan(ahead))
        assert ts is None or (ts - END) / DAY == pytest.approx(ahead, abs=1e-4)
    assert found["active"].to_pylist() == [False] + [True] * 6
    assert found["events"].to_pylist() == np.diff(everyone.offsets).tolist()
    assert found["last_event_ts"].to_pylist()[-1] == END - DAY
    assert found["region"].to_pylist()[-1] == "south"
    assert not list((root / "data/.scores").glob("*/"))


def test_embeddings_are_told_where_asked_for(root: Path, small_chunks: None) -> None:
    scoring.score(root)
    plain = pq.read_table(root / "data/scores")
    assert "7 shoppers scored" in scoring.score(root, csv=root / "all.csv", embeddings=True)
    found = pq.read_table(root / "data/scores")
    assert found.drop_columns(["embedding"]).equals(plain)
    timeline = Timeline(Sequences.load(root / "data/features/sequences"))
    cuts = timeline.cuts(np.arange(7), np.full(7, to_us(END), dtype=np.int64))
    expected = Predictor.load(root / "models/gpt").look_ahead(timeline, cuts, 0).embedding
    np.testing.assert_allclose(found["embedding"].to_pylist(), expected, rtol=1e-4, atol=1e-6)
    with (root / "all.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert len(json.loads(row["embedding"])) == expected.shape[1] == 16
    assert "already" in scoring.score(root, embeddings=True)


def test_a_day_that_is_not_over_is_no_silence() -> None:
    first, night = END - 60 * DAY, END - DAY + timedelta(hours=3, minutes=4)
    assert scoring._choose_time(first, END, night) == END - DAY + timedelta(hours=3)
    assert scoring._choose_time(first, END, END + 9 * DAY) == END
    assert scoring._choose_time(first, END, first - DAY) == END  # of a log from the future


def test_an_earlier_time_sees_only_what_was_known_then(root: Path) -> None:
    scoring.score(root, at=END - 10 * DAY)
    found = pq.read_table(root / "data/scores")
    assert "zoë, <b>" not in found["user_id"].to_pylist()
    assert max(found["last_event_ts"].to_pylist()) < END - 10 * DAY
    with pytest.raises(UserError, match="outside of the data"):
        scoring.score(root, at=END + DAY)
    # Nobody but the first shopper had been seen by then, so that chunks without rows occur.
    scoring.score(root, at=END - 55 * DAY + timedelta(seconds=1))


def test_a_killed_run_is_gone_on_with(
    root: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring.score(root)
    whole = pq.read_table(root / "data/scores")
    scoring.score(root, at=END - DAY)  # other inputs: the next run starts anew
    calls: list[int] = []
    real = scoring.score_chunk

    def dies(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(scoring, "score_chunk", dies)
    before = read_json(root / "data/scores/_scores.json")
    with pytest.raises(KeyboardInterrupt):
        scoring.score(root)
    assert read_json(root / "data/scores/_scores.json") == before  # the old result is whole
    assert "2 of 4 chunks by a run before" in scoring.score(root)
    assert len(calls) == 5
    assert pq.read_table(root / "data/scores").equals(whole)
    assert "already" in scoring.score(root)
    assert len(calls) == 5


def test_a_changed_model_scores_anew(root: Path) -> None:
    scoring.score(root)
    config = json.loads((root / "models/gpt/config.json").read_text())
    write_json(root / "models/gpt/config.json", config | {"thresholds": {"purchase_14d": 0.4}})
    assert "already" not in scoring.score(root)


def test_one_process_scores_at_a_time(root: Path) -> None:
    (root / "data/.scores").mkdir()
    handle = os.open(root / "data/.scores/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        scoring.score(root)
    os.close(handle)
    scoring.score(root)


def test_a_missing_champion_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="no champion"):
        scoring.score(root, which=Which.CHAMPION)


def test_the_csv_is_safe_in_a_spreadsheet(root: Path) -> None:
    scoring.score(root, csv=root / "out.csv")
    with (root / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["user_id"] == "'=cmd()"
    assert rows[-1]["user_id"] == "zoë, <b>"
    assert 0 <= float(rows[0]["purchase_14d"]) <= 1


def test_scores_by_another_than_the_champion_are_told_as_such(root: Path) -> None:
    digest = digest_directory(root / "models/gpt")
    assert "they are by a model that is not champion and has no verdict" in scoring.score(root)
    check = {"name": "validation", "passed": False, "why": "it is so"}
    verdict = {"candidate": digest, "champion": None, "passed": False, "checks": [check]}
    write_json(root / "reports/verdict.json", verdict)
    assert "a candidate that failed the gate and was not promoted" in scoring.score(root)
    passed = {"passed": True, "checks": [check | {"passed": True}]}
    write_json(root / "reports/verdict.json", verdict | passed)
    assert "a candidate that passed the gate but was not promoted" in scoring.score(root)
    champion = {"digest": digest, "version": 1, "verdict": None}
    write_json(root / "champion.json", champion)
    assert "they are by" not in scoring.score(root, which=Which.CANDIDATE)
    write_json(root / "champion.json", champion | {"digest": f"sha256:{'0' * 64}"})
    former = {"candidate": f"sha256:{'1' * 64}", "champion": digest}
    write_json(root / "reports/verdict.json", verdict | former)
    assert scoring.find_doubt(root, digest) == "a former champion"
    write_json(root / "reports/verdict.json", {"candidate": digest, "passed": True})
    assert "has no verdict" in (scoring.find_doubt(root, digest) or "")


def test_a_model_of_other_data_is_warned_of(root: Path) -> None:
    assert "warning" not in scoring.score(root)
    others = [hash_text(f"x{n}") for n in range(200)]
    vocabulary = root / scoring.FEATURES / "vocabulary.json"
    write_json(vocabulary, {"item": [hash_text("i3"), *others]})
    _, warned = scoring.score(root).splitlines()
    assert warned.startswith("warning: of the 201 items in these data the model knows 1:")
    write_json(vocabulary, {"item": []})
    assert "warning" not in scoring.score(root)


def test_a_time_before_the_end_of_training_is_warned_of(root: Path) -> None:
    cuts = read_json(root / "data/features/cuts.json")
    splits = {"calibration": END - 40 * DAY, "test": END - 20 * DAY}
    listed = [{"split": split, "ts": ts.isoformat()} for split, ts in splits.items()]
    write_json(root / "data/features/cuts.json", cuts | {"cuts": listed})
    warned = scoring.score(root, at=END - 20 * DAY - timedelta(seconds=1)).splitlines()
    assert len(warned) == 2
    assert warned[1].startswith("warning: training reaches to 2025-02-09")
    assert "warning" in scoring.score(root, at=END - 21 * DAY)
    assert "warning" not in scoring.score(root, at=END - 20 * DAY)
    assert "warning" not in scoring.score(root)


def test_a_missing_registry_is_not_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    champion = {"digest": f"sha256:{'0' * 64}", "version": 1, "verdict": None}
    write_json(root / "champion.json", champion)
    write_text(root / "params.yaml", "{}")
    with pytest.raises(UserError, match=r"mlflow\.db, is not here"):
        scoring.score(root)
    assert not (root / "mlflow.db").exists()


def test_one_shopper_is_no_shoppers() -> None:
    assert [say_count(n, "shopper") for n in (0, 1, 1200)] == [
        "0 shoppers", "1 shopper", "1,200 shoppers",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("data/scores/all.csv", "holds the scores alone"),
        ("out/../data/.scores/all.csv", "holds the scores alone"),
        ("out", "is a folder"),
        ("", "is a folder"),
        ("out/notes.txt/all.csv", "is no folder"),
        ("/proc/all.csv", "/proc takes no file"),
    ],
)
def test_a_csv_that_cannot_be_written_is_refused_before_any_work(
    root: Path, place: str, problem: str
) -> None:
    (root / "out").mkdir()
    (root / "out/notes.txt").touch()
    with pytest.raises(UserError, match=problem) as refused:
        scoring.score(root, csv=root / place)
    assert "\n" not in str(refused.value)
    assert not (root / "data/scores").exists()
    scoring.score(root, csv=root / "new/folder/all.csv")
    assert (root / "new/folder/all.csv").is_file()


def test_plain_numbers_are_no_formulas() -> None:
    cells = ["-12.5", "+491", "-1+1", "@sum", "\t=1", " =1", "|x", "", None, "a=b"]
    assert guard_cells(cells) == [
        "-12.5", "+491", "'-1+1", "'@sum", "'\t=1", "' =1", "'|x", "", None, "a=b",
    ]  # fmt: skip
