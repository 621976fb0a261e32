"""The deletion test tells a true explanation from chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.config import Evaluation
from pipelines.evaluation import deletion
from pipelines.features.store import Sequences, encode_events
from pipelines.model.heads import Target
from pipelines.model.predictor import Predictor
from pipelines.model.schedule import Periods
from pipelines.model.timeline import DAY
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import train_model
from tests.model.conftest import START, TINY

TARGET = Target(name="purchase_7d", kind="binary", event="purchase", horizon_days=7)
PERIODS = Periods(
    first=START + 5 * DAY, calibration=START + 42 * DAY, test=START + 49 * DAY, active_days=28.0
)
NOW = START + 56 * DAY


def make_shopper(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Views every day; a search is followed by a purchase on the next day."""
    kinds: list[tuple[float, str]] = [(day + 0.5, "view") for day in range(56)]
    for day in range(56):
        if rng.random() < 0.2:
            kinds += [(day + 0.6, "search"), (day + 1.6, "purchase")]
    return [{"ts": START + int(d * DAY), "event_type": k} for d, k in sorted(kinds)]


@pytest.fixture(scope="module")
def shop() -> Sequences:
    rng = np.random.default_rng(1)
    return encode_events([make_shopper(rng) for _ in range(80)])


@pytest.fixture(scope="module")
def model(shop: Sequences) -> Predictor:
    config = TINY.model_copy(
        update={
            "epochs": 8,
            "cuts_per_user": 16,
            "learning_rate": 0.005,
            "fusion": False,
            "half_life_days": None,
            "context": 32,
            "stride": 16,
        }
    )
    return train_model(shop, PERIODS, (TARGET,), config, Vocabulary()).shipped


def test_explained_events_matter_more_than_others(shop: Sequences, model: Predictor) -> None:
    found = deletion.measure_deletion(
        model, shop, np.arange(80), NOW, TARGET, Evaluation(bootstrap_samples=100)
    )
    assert found is not None
    assert found["users"] == 80
    # A model that has learnt nothing would have its events "explained" all alike.
    assert found["explained"]["value"] > 0.5 > 2 * found["random"]["value"]
    assert found["difference"]["low"] > 0


def test_short_histories_are_not_tested(model: Predictor) -> None:
    short = encode_events([[{"ts": START, "event_type": "view"}]] * 3)
    users = np.arange(3)
    assert deletion.measure_deletion(model, short, users, NOW, TARGET, Evaluation()) is None


def test_sequences_without_events_keep_the_others(shop: Sequences) -> None:
    less = shop.without(np.array([0, int(shop.offsets[1])]))
    assert less.events == shop.events - 2
    assert np.array_equal(less.ts[: less.offsets[1]], shop.ts[1 : shop.offsets[1]])
    assert np.diff(less.offsets)[:2].tolist() == (np.diff(shop.offsets)[:2] - 1).tolist()
