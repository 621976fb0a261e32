from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.config import Cuts
from pipelines.errors import UserError
from pipelines.events import from_us, to_us
from pipelines.features.cuts import Split, find_end, plan_cuts

FIRST = datetime(2025, 1, 1, 9, tzinfo=UTC)


def test_every_window_closes_before_the_next_kind_of_cut() -> None:
    end = FIRST.replace(hour=0) + timedelta(days=200)
    cuts = plan_cuts(FIRST, end, horizons_days=[28], params=Cuts(train=5, step_days=7, test=2))
    by_split = {s: [c.ts for c in cuts if c.split is s] for s in Split}
    longest = timedelta(days=28)
    assert {s: len(v) for s, v in by_split.items()} == {
        Split.TRAIN: 5,
        Split.BETWEEN: 3,  # a week apart before the calibration cut, for the refit
        Split.CALIBRATION: 1,
        Split.TEST: 2,
    }
    assert max(by_split[Split.TRAIN]) + longest == by_split[Split.CALIBRATION][0]
    assert by_split[Split.CALIBRATION][0] + longest == min(by_split[Split.TEST])
    assert max(by_split[Split.TEST]) + longest == end
    assert [c.index for c in cuts] == list(range(11))
    assert sorted(c.ts for c in cuts) == [c.ts for c in cuts]


@pytest.mark.parametrize("horizons", [[7, 14, 28], [3, 10, 30], [5]])
@pytest.mark.parametrize("tests", [1, 3])
def test_the_newest_window_of_every_horizon_closes_when_it_may(
    horizons: list[int], tests: int
) -> None:
    end = FIRST.replace(hour=0) + timedelta(days=200)
    params = Cuts(train=5, step_days=7, test=tests)
    cuts = plan_cuts(FIRST, end, horizons_days=horizons, params=params)
    first_test = min(c.ts for c in cuts if c.split is Split.TEST)
    (calibration,) = (c.ts for c in cuts if c.split is Split.CALIBRATION)
    for days in horizons:
        for close in (calibration, first_test):
            closing = [c.ts + timedelta(days=days) for c in cuts if c.ts < close]
            assert max(ts for ts in closing if ts <= close) == close
    assert [c.ts for c in cuts] == sorted(c.ts for c in cuts)
    assert [c.index for c in cuts] == list(range(len(cuts)))
    between = [c.ts for c in cuts if c.split is Split.BETWEEN]
    assert all(ts + timedelta(days=min(horizons)) <= first_test for ts in between)


def test_a_long_horizon_among_short_ones_does_not_fill_a_year_with_cuts() -> None:
    end = FIRST.replace(hour=0) + timedelta(days=1400)
    cuts = plan_cuts(FIRST, end, horizons_days=[7, 365], params=Cuts(train=4, step_days=7))
    assert sum(c.split is Split.BETWEEN for c in cuts) <= 4 * 2 + 4


def test_short_data_get_fewer_training_cuts() -> None:
    end = FIRST + timedelta(days=28 * 3 + 14 + 8)
    cuts = plan_cuts(FIRST, end, horizons_days=[28], params=Cuts(train=6, step_days=7))
    assert sum(c.split is Split.TRAIN for c in cuts) == 2


def test_too_short_data_are_told_with_what_to_change() -> None:
    with pytest.raises(UserError, match=r"span 60\.0 days.*need 98\.0.*targets\.horizons_days"):
        plan_cuts(FIRST, FIRST + timedelta(days=60), horizons_days=[28], params=Cuts())
    # As many as are asked for do, and a moment less does not.
    enough = FIRST + timedelta(days=98)
    cuts = plan_cuts(FIRST, enough, horizons_days=[28], params=Cuts())
    assert [c.ts for c in cuts if c.split is Split.TRAIN] == [FIRST + timedelta(days=14)]
    with pytest.raises(UserError, match="days"):
        plan_cuts(FIRST, enough - timedelta(seconds=1), horizons_days=[28], params=Cuts())


def test_the_end_is_the_day_after_or_until() -> None:
    last = datetime(2025, 3, 4, 13, tzinfo=UTC)
    assert find_end(last, None) == datetime(2025, 3, 5, tzinfo=UTC)
    assert find_end(last, datetime(2025, 3, 4, 20, tzinfo=UTC)) == datetime(
        2025, 3, 4, 20, tzinfo=UTC
    )
    # A snapshot asked for later than the data reach does not invent silent days.
    assert find_end(last, datetime(2026, 1, 1, tzinfo=UTC)) == datetime(2025, 3, 5, tzinfo=UTC)


def test_microseconds_round_trip() -> None:
    ts = datetime(2025, 3, 4, 13, 1, 2, 345678, tzinfo=UTC)
    assert from_us(to_us(ts)) == ts
