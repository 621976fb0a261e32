"""What the service reads from its store is, event by event, what training read from the log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.config import parse_params
from pipelines.features.store import Sequences, encode_events
from pipelines.model.timeline import Timeline
from serving.collect import parse_event
from serving.store import Store

ROOT = Path(__file__).resolve().parents[2]
USERS = 2500


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated shop of thousands up to its features."""
    root = tmp_path_factory.mktemp("parity")
    (root / "expectations").symlink_to(ROOT / "expectations")
    params = parse_params(
        {
            "ingest": {"simulator": {"users": USERS, "days": 90}},
            "targets": {"horizons_days": [7], "primary_horizon_days": 7},
        }
    )
    for stage in ("fingerprint", "ingest", "validate", "features"):
        import_module(f"pipelines.stages.{stage}").run(params, root)
    return root


def read_log(root: Path) -> Iterator[dict[str, Any]]:
    """The valid events as a shop sends them."""
    table = ds.dataset(root / "data/valid", format="parquet", exclude_invalid_files=True).to_table()
    for row in table.to_pylist():
        sent = {name: value for name, value in row.items() if value is not None and name != "day"}
        yield sent | {"ts": row["ts"].isoformat()}


def test_thousands_of_users_are_the_same_in_training_and_serving(
    shop: Path, tmp_path: Path
) -> None:
    store = Store(f"sqlite:///{tmp_path / 'events.db'}")
    store.create()
    rows = []
    for event in read_log(shop):
        row, result = parse_event(event, datetime.now(UTC))
        assert row is not None, result
        rows.append(row)
    for low in range(0, len(rows), 5000):
        assert all(store.append(rows[low : low + 5000]))

    trained = Sequences.load(shop / "data/features/sequences")
    people = pq.read_table(shop / "data/features/users.parquet").to_pylist()
    assert len(people) == trained.users > 0.8 * USERS
    found = store.history([p["user_id"] for p in people], before=2**62, limit=10**6)
    served = encode_events([found[p["user_id"]] for p in people], people)

    shared = {"query", "query_offsets", "query_tokens"}  # rows of another table
    for field in fields(Sequences):
        if field.name in shared:
            continue
        ours, theirs = getattr(served, field.name), np.asarray(getattr(trained, field.name))
        assert ours.dtype == theirs.dtype
        same = np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")
        assert same, f"{field.name}: {(ours != theirs).sum()} differ"
    assert texts(served) == texts(trained)

    now = np.full(trained.users, int(trained.ts.max()) + 1)
    users = np.arange(trained.users)
    features = [
        timeline.features(timeline.cuts(users, now))
        for timeline in (Timeline(served), Timeline(trained))
    ]
    assert np.array_equal(*features)


def texts(sequences: Sequences) -> list[tuple[int, ...]]:
    """The n-grams of every event's search text."""
    offsets, tokens = sequences.query_offsets, np.asarray(sequences.query_tokens)
    known = [tuple(tokens[low:high].tolist()) for low, high in pairwise(offsets)]
    return [known[query] for query in np.asarray(sequences.query)]
