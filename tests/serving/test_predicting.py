"""What a process that predicts reads and answers; the model is a stand-in that counts."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.events import EVENT_CODES, EventType
from pipelines.model.timeline import Timeline
from serving import predicting
from serving.frames import (
    HEAD_BYTES,
    Call,
    Explain,
    Explained,
    Predict,
    Predicted,
    Ready,
    Refused,
    Start,
    pack,
    read_length,
    unpack_reply,
    unpack_request,
)
from serving.limits import MAX_CLOCK_SKEW
from serving.loading import Loaded

CLOCK = datetime(2025, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def make_body(*times: datetime, now: datetime | None = None) -> bytes:
    events = [{"event_type": "view", "ts": ts.isoformat()} for ts in times]
    body: dict[str, Any] = {"users": [{"user_id": "a", "events": events}]}
    if now is not None:
        body["now"] = now.isoformat()
    return json.dumps(body).encode()


def make_call(user_id: str = "b") -> Call:
    event = {"event_type": "view", "ts": CLOCK - DAY, "item_id": None}
    return Call([(user_id, [event], {"age": 3.0})], CLOCK, 2)


MESSAGES = [
    Start("/model", None, True),
    Predict([b"{}", make_call()], CLOCK),
    Explain(make_call(), "purchase_14d"),
]
REPLIES = [
    Ready("sha256:0"),
    Refused("no"),
    Predicted([b"{}", None, b""], 1, {"purchase_14d": [0.5]}),
    Explained(b"{}"),
]


@pytest.mark.parametrize("message", [*MESSAGES, *REPLIES], ids=lambda m: type(m).__name__)
def test_messages_arrive_as_they_were_sent(message: Any) -> None:
    frame = pack(message)
    assert read_length(frame[:HEAD_BYTES]) == len(frame) - HEAD_BYTES
    unpack: Any = unpack_reply if message in REPLIES else unpack_request
    assert unpack(frame[HEAD_BYTES:]) == message


def test_the_time_is_that_of_the_request_or_the_clock_moved_behind_its_events() -> None:
    for body, now in (
        (make_body(CLOCK - DAY), CLOCK),
        (make_body(CLOCK - DAY, now=CLOCK - DAY / 2), CLOCK - DAY / 2),
        (make_body(CLOCK + timedelta(seconds=9)), CLOCK + timedelta(seconds=9, microseconds=1)),
    ):
        asked = predicting.read_call(body, CLOCK)
        assert asked is not None
        assert asked.now == now


@pytest.mark.parametrize(
    "body",
    [
        make_body(CLOCK + MAX_CLOCK_SKEW),
        make_body(CLOCK - DAY, CLOCK, now=CLOCK),
        make_body(),
        b"{}",
        b"\xff",
    ],
)
def test_what_the_schema_would_refuse_is_left_to_it(body: bytes) -> None:
    assert predicting.read_call(body, CLOCK) is None


def test_one_call_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_all(_: Loaded, calls: list[Any]) -> tuple[list[bytes], dict[str, list[float]]]:
        if any("poison" in call.ids for call in calls):
            raise ValueError("the id of somebody")
        return [str(call.ids).encode() for call in calls], {"t": [0.5] * len(calls)}

    monkeypatch.setattr(predicting, "_predict_all", predict_all)
    loaded: Any = None
    calls = [make_call("b"), b"{}", make_call("poison"), make_call("c")]
    expected = [b"['b']", None, b"", b"['c']"]
    told = predicting.predict(loaded, Predict(calls, CLOCK))
    assert told == Predicted(expected, 2, {"t": [0.5, 0.5]})


class Stream:
    """A connection whose other end has sent all it ever will."""

    def __init__(self, *frames: bytes) -> None:
        self._sent = io.BytesIO(b"".join(frames))
        self.received = io.BytesIO()
        self.read = self._sent.read
        self.write = self.received.write

    def flush(self) -> None:
        pass


def test_a_folder_without_a_model_is_refused(tmp_path: Any) -> None:
    stream: Any = Stream(pack(Start(str(tmp_path), None, False)), pack(MESSAGES[1]))
    predicting.serve(stream)
    frame = stream.received.getvalue()
    reply = unpack_reply(frame[HEAD_BYTES:])
    assert isinstance(reply, Refused)
    assert str(tmp_path) in reply.problem


def test_a_stream_that_ends_early_or_begins_otherwise_ends_the_process() -> None:
    for frames in ([], [pack(MESSAGES[0])[:2]], [pack(MESSAGES[0])[:9]], [pack(MESSAGES[1])]):
        stream: Any = Stream(*frames)
        predicting.serve(stream)
        assert stream.received.getvalue() == b""


def test_effects_stand_by_their_events_though_their_times_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = SimpleNamespace(name="purchase_14d", kind="binary", event="purchase")

    def attribute(_: Any, timeline: Timeline, *__: Any) -> Any:
        codes = np.asarray(timeline.type, dtype=np.float64)
        some = np.zeros(1)
        return SimpleNamespace(
            event=np.arange(2),
            effect=codes,
            feature_effect=some[None],
            base=some,
            value=some,
            gap=some,
        )

    monkeypatch.setattr("pipelines.model.explanation.explain", attribute)
    predictor = SimpleNamespace(targets=[target], predict=lambda *_: {"purchase_14d": [0.5]})
    events = [
        {"event_type": kind, "ts": CLOCK - DAY, "event_id": event_id, "quantity": quantity}
        for kind, event_id, quantity in (("view", "b", None), ("purchase", "a", -2.0))
    ]
    asked = Explain(Call([("ann", events, None)], CLOCK, 0), "purchase_14d")
    loaded: Any = SimpleNamespace(predictor=predictor, digest="sha256:0")
    told = json.loads(predicting.explain(loaded, asked).answer)
    effects = {entry["event_type"]: entry["effect"] for entry in told["events"]}
    assert effects == {kind: EVENT_CODES[EventType(kind)] for kind in ("view", "refund")}
