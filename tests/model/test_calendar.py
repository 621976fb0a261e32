"""Weekdays: learnt where windows are not whole weeks, and left out where they tell nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import EnsembleTrees, Pretrain
from pipelines.features.store import Sequences, encode_events
from pipelines.model.explanation import explain
from pipelines.model.fitting import Fit
from pipelines.model.heads import Heads, Target
from pipelines.model.network import NetworkConfig
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import DAY, Timeline, feature_names, population
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import pretrain_model, train_model
from pipelines.model.trees import Mix
from tests.model.conftest import PERIODS, START, TINY

TOMORROW = Target(name="purchase_1d", kind="binary", event="purchase", horizon_days=1)
SETTINGS = TINY.model_copy(update={"trees": EnsembleTrees(rounds=0), "cuts_per_user": 16})
WEEKDAY = (START // DAY + 3) % 7  # of the first day, Monday = 0; 1970 began on a Thursday


@pytest.fixture(scope="module")
def weekly() -> Sequences:
    """Shoppers who buy anything on three days of ten, but at the weekend on half of them."""
    rng = np.random.default_rng(5)
    days = np.arange(60)
    often = np.where((WEEKDAY + days) % 7 >= 5, 0.5, 0.2)
    users: list[list[dict[str, Any]]] = []
    for _ in range(150):
        bought = days[rng.random(60) < often]
        times = START + ((bought + rng.random(len(bought))) * DAY).astype(np.int64)
        users.append([{"ts": int(ts), "event_type": "purchase"} for ts in times])
    return encode_events(users)


def tell_weekend(predictor: Predictor, shop: Sequences) -> float:
    """How much likelier a purchase is called on Saturday than on Tuesday, in the last weeks."""
    timeline = Timeline(shop)
    told: dict[int, list[float]] = {1: [], 5: []}
    for day in range(47, 60):
        weekday = (WEEKDAY + day) % 7
        if weekday in told:
            cuts = population(timeline, START + day * DAY, PERIODS.active_days)
            values = predictor.finish(predictor.raw(timeline, cuts))[TOMORROW.name]
            told[weekday].append(float(values.mean()))
    return float(np.mean(told[5]) - np.mean(told[1]))


def test_the_weekend_is_learnt_and_has_a_way_of_its_own(weekly: Sequences) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 6, "learning_rate": 6e-3})
    shipped = train_model(weekly, PERIODS, (TOMORROW,), settings, Vocabulary()).shipped
    gap = tell_weekend(shipped, weekly)
    assert gap == pytest.approx(0.3, abs=0.1)
    with torch.no_grad():
        shipped.network.calendar.weight.zero_()
    assert tell_weekend(shipped, weekly) < gap - 0.02


def test_trees_see_the_weekend_and_no_shopper_is_told_it(weekly: Sequences, tmp_path: Path) -> None:
    trees = EnsembleTrees(rounds=60, learning_rate=0.1)
    settings = SETTINGS.model_copy(update={"epochs": 1, "trees": trees})
    trained = train_model(weekly, PERIODS, (TOMORROW,), settings, Vocabulary())
    trained.shipped.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    alone = loaded.beside(loaded.trees, Mix(events={"purchase": 0.0}))
    assert tell_weekend(alone, weekly) == pytest.approx(0.3, abs=0.1)
    timeline = Timeline(weekly)
    for day in (47, 50):
        cuts = population(timeline, START + day * DAY, PERIODS.active_days).take(np.arange(40))
        told = explain(alone, timeline, cuts, TOMORROW)
        assert told.feature_effect.shape == (40, len(feature_names()))
        assert told.gap.max() < 1e-5


@pytest.mark.parametrize(
    ("days", "calibration", "expected"),
    [([7, 14], 40, False), ([7, 10], 40, True), ([1], 40, True), ([1], 32, False)],
)
def test_whole_weeks_and_short_logs_have_no_use_for_it(
    days: list[int], calibration: int, expected: bool
) -> None:
    targets = tuple(replace(TOMORROW, name=f"purchase_{d}d", horizon_days=d) for d in days)
    periods = replace(PERIODS, calibration=START + calibration * DAY)
    shop = encode_events([[{"ts": START, "event_type": "view"}]])
    heads = Heads.for_targets(targets)
    fit = Fit(Timeline(shop), periods, heads, targets, SETTINGS, Vocabulary())
    assert fit.spec.network.calendar is expected
    assert hasattr(fit.network, "calendar") is expected


def test_it_is_not_pretrained_and_starts_at_zero(weekly: Sequences) -> None:
    once = Pretrain(epochs=1, learning_rate=0.002)
    weights = pretrain_model(weekly, PERIODS, (TOMORROW,), SETTINGS, once, Vocabulary())
    assert not [name for name in weights if name.startswith("calendar")]
    heads = Heads.for_targets((TOMORROW,))
    fit = Fit(Timeline(weekly), PERIODS, heads, (TOMORROW,), SETTINGS, Vocabulary())
    fit.start(PERIODS.calibration, weights)
    assert torch.count_nonzero(fit.network.calendar.weight) == 0


def test_a_network_of_before_reads_as_one_without() -> None:
    heads = Heads.for_targets((TOMORROW,))
    shop = encode_events([[{"ts": START, "event_type": "view"}]])
    fit = Fit(Timeline(shop), PERIODS, heads, (TOMORROW,), SETTINGS, Vocabulary())
    written = fit.spec.network.to_json()
    assert NetworkConfig.from_json(written) == fit.spec.network
    del written["calendar"]
    assert NetworkConfig.from_json(written).calendar is False
    del written["items"]
    with pytest.raises(KeyError):
        NetworkConfig.from_json(written)
