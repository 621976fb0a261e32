from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from pipelines.baselines.histories import (
    AGE,
    AMOUNT,
    COLUMNS,
    DAYS,
    OBSERVED,
    SPAN,
    Histories,
    with_histories,
)
from pipelines.features.cuts import Split
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.features.store import encode_events


def at(day: int, hour: int = 12) -> datetime:
    return datetime(2025, 1, day, hour, tzinfo=UTC)


def event(kind: str, ts: datetime, **columns: object) -> dict[str, object]:
    return {"event_type": kind, "ts": ts, **columns}


def make_table(cuts: list[str], users: int) -> SnapshotTable:
    rows = users * len(cuts)
    return SnapshotTable(
        user=np.tile(np.arange(users, dtype=np.int32), len(cuts)),
        cut=np.repeat(np.arange(len(cuts), dtype=np.int32), users),
        features=np.zeros((rows, 1)),
        feature_names=["f_recency"],
        labels={},
        targets=(),
        omitted=[],
        splits=dict.fromkeys(range(len(cuts)), Split.TRAIN),
        cut_times=dict(enumerate(cuts)),
    )


SEQUENCES = encode_events(
    [
        [
            event("view", at(1)),
            event("purchase", at(3, 9), price=10.0),
            event("purchase", at(3, 20), price=5.0, quantity=2.0),
            event("purchase", at(8), price=7.0),
            event("purchase", at(12), price=100.0),
        ],
        [event("view", at(4))],
        [],
    ]
)


def test_days_before_the_cut_are_counted() -> None:
    table = make_table(["2025-01-10T00:00:00+00:00", "2025-01-03T10:00:00+00:00"], users=3)
    x = with_histories(table, Histories(SEQUENCES, "purchase")).features
    np.testing.assert_allclose(x[0, [DAYS, OBSERVED, SPAN, AGE, AMOUNT]], [2, 8, 5, 6, 27])
    np.testing.assert_allclose(x[1], [0, 5, 0, 0, 0])
    np.testing.assert_allclose(x[3, [DAYS, SPAN, AGE, AMOUNT]], [1, 0, 0, 10])
    everything = with_histories(table, Histories(SEQUENCES, None))
    assert everything.feature_names == COLUMNS
    np.testing.assert_allclose(everything.features[0, [DAYS, SPAN, AGE]], [3, 7, 8])


def test_what_comes_after_the_cut_changes_nothing() -> None:
    table = make_table(["2025-01-05T00:00:00+00:00"], users=3)
    shorter = encode_events(
        [
            [event("view", at(1)), event("purchase", at(3, 9), price=20.0)],
            [event("view", at(4))],
            [],
        ]
    )
    for kind in ("purchase", "view", None):
        np.testing.assert_array_equal(
            with_histories(table, Histories(SEQUENCES, kind)).features,
            with_histories(table, Histories(shorter, kind)).features,
        )


def test_recency_never_exceeds_the_age() -> None:
    cuts = [f"2025-01-{day:02d}T{hour:02d}:00:00+00:00" for day in range(2, 15) for hour in (0, 13)]
    x = with_histories(make_table(cuts, users=3), Histories(SEQUENCES, "purchase")).features
    assert np.isfinite(x).all()
    assert (x >= 0).all()
    assert (x[:, SPAN] <= x[:, AGE]).all()
