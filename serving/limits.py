"""What a request may hold at most, and how far its times may be off."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from pipelines.events import EPOCH, MICROSECOND

# One call costs at most so much memory and time; more users go into more calls.
MAX_USERS: Final = 256
MAX_EVENTS: Final = 2000
MAX_ITEMS: Final = 50

EARLIEST: Final = EPOCH
LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)

# Clocks of shop and service differ; an event this far ahead still counts as just happened.
MAX_CLOCK_SKEW: Final = timedelta(minutes=5)


def settle_now(latest: datetime, now: datetime | None, clock: datetime) -> datetime | None:
    """Return the time from which to look ahead.

    Where none is asked for it is the service's clock, moved behind events that a faster clock
    stamped.

    Args:
        latest: time of the latest event.
        now: what was asked for.
        clock: the service's time, UTC.

    Returns:
        The time, or None where the latest event lies at or after ``now``, or further ahead than
        clocks differ.
    """
    start = now or clock
    if latest >= (start if now else start + MAX_CLOCK_SKEW):
        return None
    return max(start, latest + MICROSECOND)
