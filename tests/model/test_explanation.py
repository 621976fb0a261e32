"""Attributions add up, name the events that matter, and stay with their user."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.features.store import Sequences, encode_events
from pipelines.model.explanation import explain
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import train_model
from tests.model.conftest import PERIODS, START, TARGETS, TINY

PURCHASE = TARGETS[0]


@pytest.fixture(scope="module", params=[True, False])
def model(request: pytest.FixtureRequest) -> Predictor:
    """Knows that a search announces a purchase; with and without fusion."""
    rng = np.random.default_rng(5)
    users: list[list[dict[str, Any]]] = []
    for _ in range(120):
        events: list[dict[str, Any]] = []
        for week in range(8):
            at = START + int((7 * week + rng.random()) * DAY)
            eager = rng.random() < 0.4
            events.append({"ts": at, "event_type": "search" if eager else "view"})
            if eager:
                events.append({"ts": at + 2 * DAY, "event_type": "purchase", "price": 5.0})
        users.append(events)
    periods = replace(
        PERIODS, first=START + 7 * DAY, calibration=START + 42 * DAY, test=START + 49 * DAY
    )
    config = TINY.model_copy(
        update={"epochs": 8, "refit_epochs": 0, "learning_rate": 0.01, "fusion": request.param}
    )
    return train_model(encode_events(users), periods, TARGETS, config, Vocabulary()).shipped


def make_history(kinds: list[str], now: int) -> list[dict[str, Any]]:
    return [{"ts": now - (len(kinds) - i) * DAY // 2, "event_type": k} for i, k in enumerate(kinds)]


def test_effects_add_up_and_name_the_search(model: Predictor) -> None:
    now = START + 50 * DAY
    histories = [
        make_history(["view", "view", "search", "view"], now),
        make_history(["view"], now),
        make_history(["view", "view", "view", "view", "view"], now),
    ]
    timeline = Timeline(encode_events(histories))
    cuts = timeline.cuts(np.arange(3), np.full(3, now))
    found = explain(model, timeline, cuts, PURCHASE, steps=48)
    assert found.row.tolist() == [0] * 4 + [1] + [2] * 5
    assert found.event.tolist() == list(range(10))
    assert (found.gap < 0.05 * np.abs(found.value - found.base) + 0.05).all()
    total = np.bincount(found.row, found.effect) + found.feature_effect.sum(axis=1)
    assert total[0] > total[2]
    if not found.feature_effect.shape[1]:
        assert int(np.argmax(found.effect[:4])) == 2


def test_effects_do_not_depend_on_company(model: Predictor, shop: Sequences) -> None:
    timeline = Timeline(shop)
    now = START + 30 * DAY
    together = explain(
        model, timeline, timeline.cuts(np.arange(10), np.full(10, now)), PURCHASE, steps=8
    )
    alone = explain(
        model, timeline, timeline.cuts(np.array([7]), np.array([now])), PURCHASE, steps=8
    )
    np.testing.assert_allclose(alone.effect, together.effect[together.row == 7], atol=1e-4)
    np.testing.assert_array_equal(alone.event, together.event[together.row == 7])


def test_nobody_and_no_events(model: Predictor) -> None:
    timeline = Timeline(encode_events([[]]))
    found = explain(model, timeline, timeline.cuts(np.array([0]), np.array([START])), PURCHASE)
    assert len(found.effect) == 0
    assert np.isfinite(found.value).all()
    empty = np.zeros(0, dtype=np.int64)
    assert len(explain(model, timeline, timeline.cuts(empty, empty), PURCHASE).value) == 0


def test_amounts_are_refused(model: Predictor, shop: Sequences) -> None:
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.array([0]), np.array([START]))
    with pytest.raises(UserError, match="spend_7d"):
        explain(model, timeline, cuts, TARGETS[-1])
