"""Who of a large population stands for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.features.cuts import Cut
from pipelines.features.engine import DAY_US
from pipelines.features.store import Sequences

_DIGEST_BYTES: Final = 8


def choose_share(
    sequences: Sequences, cuts: Sequence[Cut], *, active_within_days: float | None, most: int | None
) -> float:
    """Return which share of the shoppers to keep, so that no cut has many more than ``most``.

    Args:
        sequences: all events.
        cuts: when.
        active_within_days: who is in the population; None = everyone seen so far.
        most: shoppers at a cut; None = all.
    """
    if most is None or sequences.users <= most:
        return 1.0
    owner = np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
    largest = 0
    for cut in cuts:
        seen = np.bincount(owner[sequences.ts < cut.us], minlength=sequences.users)
        inside = seen > 0
        if active_within_days is not None:
            last = sequences.ts[np.maximum(sequences.offsets[:-1] + seen - 1, 0)]
            inside &= last >= cut.us - active_within_days * DAY_US
        largest = max(largest, int(inside.sum()))
    return min(1.0, most / max(largest, 1))


def draw_users(ids: pa.ChunkedArray, share: float) -> NDArray[np.int32]:
    """Draw a share of the users by their ids: whoever is in it stays, whoever comes or goes.

    Args:
        ids: user_id of every user, by number.
        share: of them.

    Returns:
        Their numbers, ascending.
    """
    below = int(share * 2 ** (8 * _DIGEST_BYTES))
    drawn = [number for number, user_id in enumerate(ids.to_pylist()) if _hash(user_id) < below]
    return np.array(drawn, dtype=np.int32)


def _hash(text: str) -> int:
    """Return a number evenly spread over 64 bits, which knows nothing of what the text means."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest())
