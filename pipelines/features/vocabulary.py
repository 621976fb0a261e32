"""What the past teaches about texts and numbers: known categories, brands, items, scales.

Everything here is fitted on events before the calibration cut alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.features.store import Sequences


def fit_vocabulary(sequences: Sequences, *, before_us: int, max_size: int) -> dict[str, list[int]]:
    """List hashes by frequency (ties by hash).

    Args:
        sequences: all events.
        before_us: only events before this time, and users with such an event, are looked at.
        max_size: hashes kept per column.

    Returns:
        category, brand, item, gender, region -> ``hash_text`` values; missing ones are left out.
    """
    past = sequences.ts < before_us
    seen = _users_seen(sequences, past)
    columns = {
        "category": sequences.category[past],
        "brand": sequences.brand[past],
        "item": sequences.item[past],
        "gender": sequences.gender[seen],
        "region": sequences.region[seen],
    }
    return {name: _by_frequency(values, max_size) for name, values in columns.items()}


def fit_scalers(sequences: Sequences, *, before_us: int) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of log1p price, log1p quantity and age (years).

    A column without a known value gets mean 0 and standard deviation 1.
    """
    past = sequences.ts < before_us
    seen = _users_seen(sequences, past)
    return {
        "log_price": _fit_scale(np.log1p(np.maximum(sequences.price[past], 0))),
        "log_quantity": _fit_scale(np.log1p(np.maximum(sequences.quantity[past], 0))),
        "age": _fit_scale(sequences.age[seen]),
    }


def _users_seen(sequences: Sequences, past: NDArray[np.bool_]) -> NDArray[np.bool_]:
    before = np.concatenate([[0], np.cumsum(past)])
    counts: NDArray[np.bool_] = np.diff(before[sequences.offsets]) > 0
    return counts


def _by_frequency(values: NDArray[np.uint32], max_size: int) -> list[int]:
    hashes, counts = np.unique(values[values > 0], return_counts=True)
    order = np.lexsort((hashes, -counts))[:max_size]
    return [int(h) for h in hashes[order]]


def _fit_scale(values: NDArray[Any]) -> dict[str, float]:
    known = values[np.isfinite(values)].astype(np.float64)
    std = float(known.std()) if len(known) else 0.0
    return {
        "mean": round(float(known.mean()), 9) if len(known) else 0.0,
        "std": round(std, 9) if std > 1e-9 else 1.0,
    }
