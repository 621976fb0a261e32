"""A process that predicts: `python -m serving.predicting FD [CORE]`, started by ``serving.engine``.

It talks over the socket that it inherits as file descriptor FD, and ends when the other end closes
it, however that comes about; it stays on the core CORE. Model and PyTorch live here, so that the
service's own process, which talks to the network, never waits for the interpreter while a batch is
predicted.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import BufferedRWPair
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import json

from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES, from_us, to_us
from pipelines.features.store import encode_events, order_events
from serving.decode import decode_request, to_mapping
from serving.frames import (
    HEAD_BYTES,
    Call,
    Explain,
    Explained,
    Predict,
    Predicted,
    Ready,
    Refused,
    Reply,
    Request,
    Start,
    pack,
    read_length,
    unpack_request,
)
from serving.limits import settle_now
from serving.loading import Loaded, load

# The service's process answers all the others while this one works on one batch: it goes first.
_NICE: Final = 5

_MAX_EFFECTS: Final = 20
_LOG: Final = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a call asks for.

    Attributes:
        ids: of shoppers.
        events: of each, in any order, as ``encode_events`` takes them.
        profiles: of each.
        now: from when to look ahead.
        next_items: how many are told.
    """

    ids: list[str]
    events: list[Sequence[Any]]
    profiles: list[Mapping[str, Any] | None]
    now: datetime
    next_items: int


def read_call(call: bytes | Call, clock: datetime) -> Asked | None:
    """Return what is asked for; None where the schema has to judge it.

    Args:
        call: the body of a request, or shoppers that were checked already.
        clock: the service's time.
    """
    if isinstance(call, Call):
        ids, events, profiles = zip(*call.users, strict=True)
        return Asked(list(ids), list(events), list(profiles), call.now, call.next_items)
    read = decode_request(call)
    if read is None:
        return None
    request, latest = read
    now = settle_now(latest, request.now, clock)
    if now is None:
        return None
    return Asked(
        [user.user_id for user in request.users],
        [user.events for user in request.users],
        [to_mapping(user.profile) if user.profile else None for user in request.users],
        now,
        request.next_items,
    )


def predict(loaded: Loaded, batch: Predict) -> Predicted:
    """Answer the calls of a batch in one pass; by themselves where one of them fails all."""
    read = [read_call(call, batch.clock) for call in batch.calls]
    asked = [call for call in read if call is not None]
    try:
        told, probabilities = _predict_all(loaded, asked) if asked else ([], {})
    except Exception:
        if len(batch.calls) == 1:
            # What the text of the exception quotes is not for the log: whose it is, nobody knows.
            _LOG.error("predicting failed: %s", _locate(sys.exc_info()[1]))
            return Predicted(answers=[b""], users=0, probabilities={})
        return _join([predict(loaded, Predict([call], batch.clock)) for call in batch.calls])
    answers = iter(told)
    return Predicted(
        answers=[None if call is None else next(answers) for call in read],
        users=sum(len(call.ids) for call in asked),
        probabilities=probabilities,
    )


def _join(parts: list[Predicted]) -> Predicted:
    probabilities: dict[str, list[float]] = {}
    for part in parts:
        for name, values in part.probabilities.items():
            probabilities.setdefault(name, []).extend(values)
    return Predicted(
        answers=[answer for part in parts for answer in part.answers],
        users=sum(part.users for part in parts),
        probabilities=probabilities,
    )


def _locate(error: BaseException | None) -> str:
    """Return the kind of an error and where it came up."""
    place = error.__traceback__ if error is not None else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
    return f"{type(error).__name__}{where}"


def _predict_all(loaded: Loaded, calls: list[Asked]) -> tuple[list[bytes], dict[str, list[float]]]:
    """Return the body of an answer for every call, and the probabilities of all shoppers."""
    from pipelines.model.timeline import Timeline

    predictor = loaded.predictor
    sequences = encode_events(
        [events for call in calls for events in call.events],
        [profile for call in calls for profile in call.profiles],
    )
    timeline = Timeline(sequences)
    counts = [len(call.ids) for call in calls]
    nows = np.repeat([to_us(call.now) for call in calls], counts)
    cuts = timeline.cuts(np.arange(sum(counts)), nows)
    # Who wants fewer items than another gets the first of theirs.
    ahead = predictor.look_ahead(timeline, cuts, max(call.next_items for call in calls))
    finished = predictor.finish(ahead.raw)
    if not all(np.isfinite(values).all() for values in finished.values()):
        raise FloatingPointError("a prediction is no number")
    predicted = {name: values.tolist() for name, values in finished.items()}
    days = [float("nan")] * len(cuts)
    if "purchase" in predictor.spec.heads.events:
        days = predictor.days_until(ahead.raw, "purchase").tolist()
    names = predictor.spec.vocabulary.item_id
    kinds = {target.name: target.kind for target in predictor.targets}
    binary = {name: values for name, values in predicted.items() if kinds[name] == "binary"}
    amounts = {name: values for name, values in predicted.items() if kinds[name] == "amount"}
    bodies = []
    row = 0
    for call in calls:
        now = call.now.astimezone(UTC)
        predictions = []
        for user_id in call.ids:
            found = zip(
                ahead.items[row, : call.next_items].tolist(),
                ahead.chances[row, : call.next_items].tolist(),
                strict=True,
            )
            predictions.append(
                {
                    "user_id": user_id,
                    "probabilities": {name: values[row] for name, values in binary.items()},
                    "expected_spend": {name: values[row] for name, values in amounts.items()},
                    "next_purchase": (
                        now + timedelta(days=days[row]) if days[row] == days[row] else None
                    ),
                    "next_items": [
                        {"item_id": names[code], "probability": chance} for code, chance in found
                    ],
                }
            )
            row += 1
        answer = {"model": loaded.digest, "now": now, "predictions": predictions}
        bodies.append(json.encode(answer))
    return bodies, binary


def explain(loaded: Loaded, asked: Explain) -> Explained:
    """Tell what moved a prediction.

    Raises:
        UserError: the model has no such target.
    """
    from pipelines.model.explanation import explain as attribute
    from pipelines.model.timeline import Timeline, feature_names

    predictor = loaded.predictor
    targets = {target.name: target for target in predictor.targets}
    if asked.target not in targets:
        known = ", ".join(name for name, t in targets.items() if t.kind == "binary")
        raise UserError(f"target {asked.target!r} is not one of {known}")
    target = targets[asked.target]
    ((_, unordered, profile),) = asked.call.users
    # Effects are told by places of this order.
    times, events = order_events(unordered)
    sequences = encode_events([events], [profile])
    timeline = Timeline(sequences)
    nows = np.array([to_us(asked.call.now)], dtype=np.int64)
    cuts = timeline.cuts(np.zeros(1, dtype=np.int64), nows)
    found = attribute(predictor, timeline, cuts, target)
    probability = float(predictor.predict(sequences, nows)[target.name][0])
    # Effects are on the event; that nobody does anything is its opposite.
    sign = -1.0 if target.event is None else 1.0
    order = np.argsort(-np.abs(found.effect), kind="stable")[:_MAX_EFFECTS]
    features = found.feature_effect[0]
    strongest = np.argsort(-np.abs(features), kind="stable")[:_MAX_EFFECTS]
    names = feature_names()
    answer = {
        "model": loaded.digest,
        "now": asked.call.now.astimezone(UTC),
        "target": target.name,
        "probability": probability,
        "start": sign * float(found.base[0]),
        "end": sign * float(found.value[0]),
        "gap": float(np.abs(found.gap[0])),
        "events": [
            {
                "ts": from_us(times[place]),
                # What the model took it for: a purchase of a negative quantity is a refund.
                "event_type": EVENT_TYPES[int(sequences.type[place]) - 1],
                "item_id": events[place].item_id,
                "query": events[place].query,
                "effect": sign * float(effect),
            }
            for place, effect in zip(found.event[order], found.effect[order], strict=True)
        ],
        "features": [{"feature": names[i], "effect": sign * float(features[i])} for i in strongest],
    }
    return Explained(json.encode(answer))


def answer(loaded: Loaded, request: Request) -> Reply:
    """Do what is asked for."""
    if isinstance(request, Predict):
        return predict(loaded, request)
    try:
        return explain(loaded, request)
    except UserError as error:
        return Refused(str(error))


def serve(stream: BufferedRWPair) -> None:
    """Load the model that the first message names, then answer until the other end closes."""
    start = _read(stream)
    if not isinstance(start, Start):
        return
    try:
        loaded = load(Path(start.model), digest=start.digest, check=start.check)
    except Exception as error:
        # Shapes that do not fit, a file cut short, no memory: all are reasons to refuse.
        _write(stream, Refused(str(error) or type(error).__name__))
        return
    # What is there now stays: not to be looked through for garbage again and again.
    gc.collect()
    gc.freeze()
    _write(stream, Ready(loaded.digest))
    while (request := _read(stream)) is not None:
        if isinstance(request, Start):
            return
        _write(stream, answer(loaded, request))


def _read(stream: BufferedRWPair) -> Start | Request | None:
    head = stream.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return None
    length = read_length(head)
    content = stream.read(length)
    return unpack_request(content) if len(content) == length else None


def _write(stream: BufferedRWPair, reply: Reply) -> None:
    stream.write(pack(reply))
    stream.flush()


def main() -> int:
    """Predict until the service goes."""
    # A signal to the whole group is for the service, which answers what is open before it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICE)
    if len(sys.argv) > 2 and sys.platform == "linux":
        # A core that was there a moment ago may be gone.
        with suppress(OSError):
            os.sched_setaffinity(0, {int(sys.argv[2])})
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    with (
        socket.socket(fileno=int(sys.argv[1])) as connection,
        connection.makefile("rwb") as stream,
    ):
        try:
            serve(stream)
        except (BrokenPipeError, ConnectionResetError):
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
