"""What a request may hold at most."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

# One call costs at most so much memory and time; more users go into more calls.
MAX_USERS: Final = 256
MAX_EVENTS: Final = 2000
MAX_ITEMS: Final = 50

EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)
