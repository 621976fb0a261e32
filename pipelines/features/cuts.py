"""Global cut times: what is trained on, calibrated on and tested on, in this order in time.

The history of a cut is what happened before it; the label window of horizon H is
[cut, cut + H days). With the longest horizon L, the last test cut is L before the end of the
data, the calibration cut L before the first test cut, the last training cut L before that: so
every label window closes before the next kind of cut begins.

Shorter windows close earlier. For them there are cuts between, so that what learns from cuts
learns each horizon up to the newest window that closed, not up to L before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from pipelines.config import Cuts
from pipelines.errors import UserError
from pipelines.events import to_us

DAY: Final = timedelta(days=1)


class Split(StrEnum):
    """What a cut is for.

    A cut between the last training cut and the calibration cut, or between that and the first
    test cut, is learnt from like a training cut, but only by those windows that close in time.
    """

    TRAIN = "train"
    BETWEEN = "between"
    CALIBRATION = "calibration"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A point in time at which everybody is predicted.

    Attributes:
        index: position in time, from 0.
        ts: UTC.
        split: what it is for.
    """

    index: int
    ts: datetime
    split: Split

    @property
    def us(self) -> int:
        """Microseconds since the epoch."""
        return to_us(self.ts)


def find_end(last: datetime, until: datetime | None) -> datetime:
    """Return when the data end: ``until``, else the start of the UTC day after the last event."""
    day_after = last.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + DAY
    return day_after if until is None else min(until, day_after)


def plan_cuts(
    first: datetime, end: datetime, *, horizons_days: Sequence[int], params: Cuts
) -> tuple[Cut, ...]:
    """Place the cuts.

    Args:
        first: time of the first event.
        end: when the data end.
        horizons_days: the horizons, in any order.
        params: how many cuts.

    Returns:
        Cuts in order of time. There may be fewer training cuts than asked for, where the data
        are short, but never none.

    Raises:
        UserError: not even one training cut fits.
    """
    horizon_days = max(horizons_days)
    horizon = horizon_days * DAY
    step = params.step_days * DAY
    tests = [end - horizon - k * step for k in reversed(range(params.test))]
    calibration = tests[0] - horizon
    last_train = calibration - horizon
    earliest = first + params.min_history_days * DAY
    trains = [last_train - k * step for k in reversed(range(params.train))]
    trains = [ts for ts in trains if ts >= earliest]
    if not trains:
        have = (end - first) / DAY
        need = have + (earliest - last_train) / DAY
        raise UserError(
            f"the events span {have:.1f} days; cuts with horizons up to {horizon_days} days need "
            f"{need:.1f}: shorten targets.horizons_days, cuts.min_history_days or cuts.test"
        )
    splits = dict.fromkeys(trains, Split.TRAIN)
    # Up to the calibration cut itself (0), as the refit knows the longest windows there too.
    before = _list_between(last_train, calibration, (0, *horizons_days), params)
    after = _list_between(calibration, tests[0], horizons_days, params)
    splits |= dict.fromkeys((*before, *after), Split.BETWEEN)
    splits[calibration] = Split.CALIBRATION
    splits |= dict.fromkeys(tests, Split.TEST)
    return tuple(
        Cut(index=index, ts=ts, split=split)
        for index, (ts, split) in enumerate(sorted(splits.items()))
    )


def _list_between(
    begin: datetime, close: datetime, back_days: Sequence[int], params: Cuts
) -> set[datetime]:
    """Return times between two cuts: steps back from each of some days before the second.

    From each there are as many as training cuts at most, so that a long horizon among short ones
    does not fill a year with cuts.
    """
    step = params.step_days * DAY
    times = {close - days * DAY - k * step for days in back_days for k in range(params.train)}
    return {ts for ts in times if begin < ts < close}


def describe_cuts(
    cuts: tuple[Cut, ...], *, first: datetime, last: datetime, end: datetime
) -> dict[str, Any]:
    """The content of cuts.json."""
    return {
        "first_ts": first.isoformat(),
        "last_ts": last.isoformat(),
        "end_ts": end.isoformat(),
        "cuts": [
            {"index": c.index, "ts": c.ts.isoformat(), "ts_us": c.us, "split": str(c.split)}
            for c in cuts
        ],
    }
