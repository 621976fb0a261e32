"""Events that the shop sends: each is accepted, known already, or refused with a reason."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, ValidationError

from pipelines.events import to_us
from serving.limits import MAX_CLOCK_SKEW
from serving.schema import Event, StoredId, Strict

MAX_COLLECTED: Final = 1000


class CollectedEvent(Event):
    """An event with the shopper who did it."""

    user_id: StoredId
    event_id: StoredId | None = None


class Outcome(StrEnum):
    """What became of an event."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


class CollectRequest(Strict):
    """Events to keep; each is judged by itself."""

    events: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=MAX_COLLECTED, fail_fast=True)
    ]


class CollectResult(BaseModel):
    """What became of one event."""

    outcome: Outcome
    event_id: str | None = None
    reason: str | None = None
    field: str | None = None


class CollectResponse(BaseModel):
    """What became of the events, in their order. Accepted ones and duplicates are stored."""

    accepted: int
    duplicates: int
    rejected: int
    results: list[CollectResult]


def parse_event(
    raw: dict[str, Any], clock: datetime
) -> tuple[dict[str, Any] | None, CollectResult]:
    """Check one event.

    Args:
        raw: as it was sent.
        clock: the service's time, UTC; what lies further ahead than clocks differ is refused.

    Returns:
        A row for the store, None when it is refused, and the result so far.
    """
    # One unknown field is enough to be refused for.
    some = dict(islice(raw.items(), len(CollectedEvent.model_fields) + 1))
    known = {name: raw[name] for name in CollectedEvent.model_fields if name in raw}
    try:
        event = CollectedEvent.model_validate_json(json.dumps(some | known))
    except (ValidationError, ValueError) as error:
        if not isinstance(error, ValidationError):
            return None, CollectResult(outcome=Outcome.REJECTED, reason="not valid JSON")
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        return None, CollectResult(outcome=Outcome.REJECTED, reason=first["msg"], field=field)
    if event.ts > clock + MAX_CLOCK_SKEW:
        reason = "Event must not lie in the future"
        return None, CollectResult(outcome=Outcome.REJECTED, reason=reason, field="ts")
    row = event.model_dump(mode="python") | {
        "ts": to_us(event.ts),
        "event_type": event.event_type.value,
    }
    row["event_id"] = event.event_id or hash_event(row)
    return row, CollectResult(outcome=Outcome.ACCEPTED, event_id=row["event_id"])


def hash_event(row: dict[str, Any]) -> str:
    """Return an id of an event's content, for shops that give their events none."""
    content = {name: value for name, value in sorted(row.items()) if name != "event_id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def summarise(results: list[CollectResult]) -> CollectResponse:
    """Count outcomes."""
    counts = {outcome: sum(r.outcome is outcome for r in results) for outcome in Outcome}
    return CollectResponse(
        accepted=counts[Outcome.ACCEPTED],
        duplicates=counts[Outcome.DUPLICATE],
        rejected=counts[Outcome.REJECTED],
        results=results,
    )
