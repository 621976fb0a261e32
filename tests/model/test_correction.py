"""Belief in trees is chosen with care, and a refit's level lies between two that are in doubt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.model.correction import _between, _deviance, _label, _settle, doubt_level
from pipelines.model.heads import Heads
from pipelines.model.predictor import Raw
from pipelines.model.timeline import DAY, Labels
from tests.model.conftest import START, TARGETS


@pytest.mark.parametrize(("good", "expected"), [(0, 0.0), (20, 1.0), (None, 0.5)])
def test_belief_leaves_one_half_for_a_reason_only(good: int | None, expected: float) -> None:
    rng = np.random.default_rng(1)
    losses = np.tile(rng.exponential(size=400), (21, 1))
    # Some are told better by the one, some by the other, in all about as well.
    better = rng.normal(size=400)
    better += 0.3 * better.std() / np.sqrt(400) - better.mean()
    losses += better * 0.05 * np.arange(21)[:, None]
    if good is not None:
        losses += 0.5 * np.abs(np.arange(21) - good)[:, None]
    assert _settle(losses, np.arange(400) // 2) == expected


def test_belief_counts_shoppers_and_not_rows() -> None:
    """Forty weeks of one shopper are no forty shoppers."""
    gain = np.random.default_rng(2).normal(size=10)
    gain = 0.1 - (gain - gain.mean()) / gain.std()
    losses = np.repeat(gain, 40) * np.linspace(1.0, 0.0, 21)[:, None]
    assert _settle(losses, np.arange(400)) == 1.0
    assert _settle(losses, np.repeat(np.arange(10), 40)) == 0.5


def test_an_amount_is_told_best_by_itself() -> None:
    expected = np.linspace(0.5, 100, 200)
    for actual in (0.5, 20.0, 60.0):
        loss = _deviance(np.full(200, actual), expected)
        assert expected[loss.argmin()] == pytest.approx(actual, abs=0.5)
    # Who buys nothing is told best by the least.
    assert (np.diff(_deviance(np.zeros(200), expected)) > 0).all()


def test_who_leaves_does_nothing_within_the_horizon() -> None:
    heads = Heads.for_targets(TARGETS)
    delay = np.full((4, len(heads.events)), np.inf)
    delay[:, heads.events.index("search")] = [6.9, 7.0, np.inf, 1.0]
    delay[:, heads.events.index("any")] = [6.9, 7.0, np.inf, 0.5]
    labels = Labels(delay=delay, observed_days=np.full(4, 7.0), amount=np.zeros((4, 1), np.float32))
    told = {t.name: _label(t, heads, labels).tolist() for t in TARGETS if t.kind == "binary"}
    assert told["search_7d"] == [True, False, False, True]
    assert told["churn_7d"] == [False, True, True, False]
    assert not any(told["purchase_7d"])


def test_the_level_of_many_alike_windows_is_doubted_least() -> None:
    heads = Heads.for_targets(TARGETS)
    # All windows closed, and four weeks of them.
    begin, close, rows = START, START + 28 * DAY, 4_000
    ts = np.full(rows, begin)
    shape = (rows, len(heads.events), len(heads.grid))
    none = np.zeros((rows, 0))
    said = Raw(survival=np.full(shape, 0.5), amount=none, spend=none)
    # 1,000 of information and 100 of doubt; of the windows that differ by .3 four are seen.
    week = heads.grid.index(7)
    doubt = doubt_level(heads, said, ts, begin, close, np.full(shape[1:], 0.09))
    np.testing.assert_allclose(doubt[:, week], 1 / 1_100 + 0.09 / 4)
    np.testing.assert_allclose(doubt_level(heads, said, ts, begin, close, 0.0), 1 / 1_100)
    few = np.arange(40)
    fewer = doubt_level(heads, said.take(few), ts[few], begin, close, 0.0)
    np.testing.assert_allclose(fewer, 1 / 110)
    # Windows that end after the test cut tell nothing; of longer ones there is one at least.
    early = begin + 5 * DAY
    for place, days in enumerate(heads.grid):
        closed = doubt_level(heads, said, ts, begin, early, 0.09)[:, place]
        chance = 1 / 1_100 if days <= 5 else 1 / 100
        np.testing.assert_allclose(closed, chance + 0.09 / max(5 / days, 1))


def test_levels_meet_by_their_variances() -> None:
    rng = np.random.default_rng(3)
    odds = rng.normal(-1.0, 1.0, size=(5_000, 1)) + np.array([0.0, 0.1, 0.2])

    def probability(shift: float) -> np.ndarray[Any, Any]:
        return 1 / (1 + np.exp(-odds - shift))

    own = probability(0.0)
    mean = own.mean(axis=0)
    near = probability(0.04)
    for doubt, share in ((0.0, 1.0), (0.05**2, 0.5), (3 * 0.05**2, 0.25), (1e12, 0.0)):
        level = _between(own, near, np.full(3, doubt))
        np.testing.assert_allclose(level, mean + share * (near.mean(axis=0) - mean), atol=1e-9)
    # Ten standard deviations apart: the last steps must have left it there.
    far = probability(0.5).mean(axis=0)
    level = _between(own, probability(0.5), np.full(3, 0.05**2))
    assert ((level - mean) / (far - mean) > 0.98).all()
    # One interval's is believed, the next one's not: still never less than until the one before.
    level = _between(own, probability(0.5), np.array([0.0, 1e12, 1e12]))
    assert (np.diff(level) >= 0).all()
    assert level[0] == pytest.approx(far[0])
