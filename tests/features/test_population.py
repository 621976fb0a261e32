"""How many of the shoppers are drawn, and who."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from pipelines.features.cuts import Cut, Split
from pipelines.features.population import choose_share, draw_users
from pipelines.features.store import encode_events

START = datetime(2025, 1, 1, tzinfo=UTC)
CUTS = tuple(
    Cut(index=index, ts=START + timedelta(days=day), split=Split.TRAIN)
    for index, day in enumerate((10, 20))
)
# Who came on which days; the last one after both cuts.
VISITS = ([1], [5, 6], [10], [9, 15], [19], [30])
SHOP = encode_events(
    [[{"event_type": "view", "ts": START + timedelta(days=day)} for day in days] for days in VISITS]
)


@pytest.mark.parametrize(
    ("active", "most", "share"),
    [
        (None, None, 1.0),
        (None, 6, 1.0),
        (None, 3, 3 / 5),  # five had been seen before the second cut
        (5, 2, 2 / 2),  # the last five days of either hold two, the first instant included
        (5, 1, 1 / 2),
        (1, 2, 1.0),  # the share is of those who are there, not of all
    ],
)
def test_the_largest_cut_sets_the_share(
    active: float | None, most: int | None, share: float
) -> None:
    assert choose_share(SHOP, CUTS, active_within_days=active, most=most) == share


def test_nobody_before_any_cut() -> None:
    early = [Cut(index=0, ts=START, split=Split.TRAIN)]
    assert choose_share(SHOP, early, active_within_days=None, most=1) == 1.0


def test_whoever_is_drawn_stays_whoever_comes_or_goes() -> None:
    ids = [f"user-{n}" for n in range(20_000)]
    drawn = draw_users(pa.chunked_array([ids]), 0.3)
    # Within four standard errors, in every part of the list alike.
    assert len(drawn) == pytest.approx(6_000, abs=4 * (20_000 * 0.3 * 0.7) ** 0.5)
    parts = np.bincount(drawn % 10, minlength=10)
    np.testing.assert_allclose(parts, 600, atol=4 * (2_000 * 0.3 * 0.7) ** 0.5)
    fewer = draw_users(pa.chunked_array([ids[5_000:]]), 0.3)
    np.testing.assert_array_equal(fewer + 5_000, drawn[drawn >= 5_000])
    assert set(draw_users(pa.chunked_array([ids]), 0.2)) < set(drawn)
