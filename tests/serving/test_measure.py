from __future__ import annotations

import time

from pipelines.events import EVENT_TYPES
from pipelines.features.store import encode_events
from serving import measure


def test_a_slow_model_is_measured_as_one() -> None:
    times = measure.measure(lambda: time.sleep(0.001))
    assert 1.0 <= times["p50_ms"] <= times["p99_ms"]
    assert measure.measure(lambda: None)["p99_ms"] < 1.0


def test_the_history_holds_what_a_request_may() -> None:
    history = measure.make_history()
    assert len(history) == measure.EVENTS
    assert {event["event_type"] for event in history} == set(EVENT_TYPES)
    assert encode_events([history]).offsets.tolist() == [0, measure.EVENTS]
