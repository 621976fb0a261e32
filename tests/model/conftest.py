"""A tiny shop with a pattern worth learning: who searches, buys the next day."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.config import Train
from pipelines.features.store import MISSING_TIME, Sequences, encode_events
from pipelines.model.heads import Target
from pipelines.model.schedule import Periods
from pipelines.model.timeline import DAY
from pipelines.model.tokens import Vocabulary

START = 1_700_000_000_000_000 // DAY * DAY

TARGETS = (
    Target(name="purchase_3d", kind="binary", event="purchase", horizon_days=3),
    Target(name="purchase_7d", kind="binary", event="purchase", horizon_days=7),
    Target(name="search_7d", kind="binary", event="search", horizon_days=7),
    Target(name="churn_7d", kind="binary", event=None, horizon_days=7),
    Target(name="spend_7d", kind="amount", event=None, horizon_days=7),
)

PERIODS = Periods(
    first=START + 5 * DAY, calibration=START + 40 * DAY, test=START + 47 * DAY, active_days=14.0
)

TINY = Train(
    width=16,
    layers=2,
    heads=2,
    context=16,
    stride=8,
    epochs=2,
    refit_epochs=1,
    cuts_per_user=4,
    tokens_per_batch=512,
    item_buckets=16,
    query_buckets=16,
    learning_rate=2e-3,
    device="cpu",
)


def make_user(rng: np.random.Generator, days: int = 60) -> list[dict[str, Any]]:
    """Views at random, now and then a search, and a purchase within a day of most searches."""
    events: list[dict[str, Any]] = []
    time = float(rng.exponential(5.0))
    while time < days:
        kind = "search" if rng.random() < 0.2 else "view"
        event = {
            "ts": START + int(time * DAY),
            "event_type": kind,
            "category": "ab"[len(events) % 2],
        }
        if kind == "search":
            event["query"] = f"red {rng.choice(['shoe', 'hat'])}"
            if rng.random() < 0.7:
                bought = {"event_type": "purchase", "item_id": "i1", "price": 10.0, "quantity": 2.0}
                events.append({"ts": event["ts"] + DAY // 2, **bought})
        events.append(event)
        time += float(rng.exponential(2.0))
    return events or [{"ts": START, "event_type": "view"}]


@pytest.fixture(scope="session")
def shop() -> Sequences:
    rng = np.random.default_rng(3)
    users = [make_user(rng) for _ in range(60)]
    profiles = [{"age": 20.0 + i, "gender": "f" if i % 2 else None} for i in range(len(users))]
    return encode_events(users, profiles)


@pytest.fixture(scope="session")
def vocabulary(shop: Sequences) -> Vocabulary:
    return Vocabulary(
        category=tuple(int(h) for h in np.unique(shop.category) if h),
        gender=tuple(int(h) for h in np.unique(shop.gender) if h),
    )


def empty_profiles(users: int) -> dict[str, Any]:
    return {
        "age": np.full(users, np.nan, dtype=np.float32),
        "gender": np.zeros(users, dtype=np.uint32),
        "region": np.zeros(users, dtype=np.uint32),
        "signup_ts": np.full(users, MISSING_TIME, dtype=np.int64),
    }
