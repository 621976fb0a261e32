"""How long a packaged model takes for one shopper.

`python -m serving.measure`, run in a Bento's source folder, checks the golden predictions, then
encodes and predicts one shopper with 100 made-up events again and again, with the model and the
code that lie there, and prints the median and the 99th percentile in milliseconds as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, Final

import numpy as np

from pipelines.events import EVENT_TYPES
from pipelines.features.store import encode_events
from serving import golden

EVENTS: Final = 100
_WARM_UP: Final = 20
_ROUNDS: Final = 5
_CALLS: Final = 40
_HOUR_US: Final = 3_600_000_000


def make_history() -> list[dict[str, Any]]:
    """Return events of all types, an hour apart, each with everything an event can have."""
    return [
        {
            "event_id": str(number),
            "ts": number * _HOUR_US,
            "event_type": kind,
            "item_id": f"item {number % 17}",
            "category": f"category {number % 5}",
            "brand": f"brand {number % 7}",
            "price": 10.0 + number,
            "quantity": 1.0,
            "query": f"red shoes {number % 3}" if kind == "search" else None,
            "session_id": str(number // 4),
        }
        for number, kind in enumerate(islice(cycle(EVENT_TYPES), EVENTS))
    ]


def measure(predict: Callable[[], object]) -> dict[str, float]:
    """Time a call.

    What else the machine does can only add to a time, so that of several rounds the quickest is
    nearest to the model's own.

    Args:
        predict: what is timed.

    Returns:
        ``p50_ms`` and ``p99_ms``.
    """
    for _ in range(_WARM_UP):
        predict()
    rounds = []
    for _ in range(_ROUNDS):
        times = []
        for _ in range(_CALLS):
            started = time.perf_counter()
            predict()
            times.append(1000 * (time.perf_counter() - started))
        rounds.append(np.percentile(times, [50, 99]))
    p50, p99 = np.min(rounds, axis=0).tolist()
    return {"p50_ms": p50, "p99_ms": p99}


def main() -> int:
    """Check and measure the model in the current folder."""
    if code := golden.main():
        return code
    from pipelines.model.predictor import Predictor

    predictor = Predictor.load(golden.MODEL)
    history = make_history()
    now = np.array([EVENTS * _HOUR_US], dtype=np.int64)
    print(json.dumps(measure(lambda: predictor.predict(encode_events([history]), now))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
