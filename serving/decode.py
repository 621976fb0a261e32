"""Reads requests fast: most of what a prediction costs beside the network is checking its events.

msgspec reads and checks a good request in a fraction of pydantic's time. It is let decide nothing:
what it does not take goes to pydantic, which judges it and says what is wrong. So it may take less
than the schema allows, and must never take more, nor read another value.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final

from msgspec import Meta, MsgspecError, Struct, json
from msgspec.structs import asdict

from pipelines.events import (
    MAX_ID_LENGTH,
    MAX_PRICE,
    MAX_QUANTITY,
    MAX_QUERY_LENGTH,
    EventType,
)
from serving.limits import EARLIEST, LATEST, MAX_EVENTS, MAX_ITEMS, MAX_USERS

# A NUL in a JSON text; and more digits of a second than a microsecond has, where rounding differs.
# One search after the other: one for both takes five times as long, and points are fewer than
# colons.
_NUL: Final = rb"\u0000"
_LONG: Final = re.compile(rb"\.\d{7}")
_FINE: Final = re.compile(rb":\d\d\.\d{7}")

_Time = Annotated[datetime, Meta(tz=True)]
_Identifier = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)]
_Text = Annotated[str, Meta(max_length=MAX_ID_LENGTH)]


class FastEvent(Struct, forbid_unknown_fields=True, gc=False):
    """``serving.schema.Event``."""

    event_type: EventType
    ts: _Time
    event_id: _Identifier | None = None
    item_id: _Text | None = None
    category: _Text | None = None
    brand: _Text | None = None
    price: Annotated[float, Meta(ge=0, le=MAX_PRICE)] | None = None
    quantity: Annotated[float, Meta(ge=-MAX_QUANTITY, le=MAX_QUANTITY)] | None = None
    query: Annotated[str, Meta(max_length=MAX_QUERY_LENGTH)] | None = None
    session_id: _Text | None = None


class FastProfile(Struct, forbid_unknown_fields=True, gc=False):
    """``serving.schema.Profile``."""

    age: Annotated[float, Meta(ge=0, le=150)] | None = None
    gender: _Text | None = None
    region: _Text | None = None
    signup_ts: _Time | None = None


class FastUser(Struct, forbid_unknown_fields=True, gc=False):
    """``serving.schema.User``."""

    user_id: _Identifier
    events: Annotated[list[FastEvent], Meta(min_length=1, max_length=MAX_EVENTS)]
    profile: FastProfile | None = None


class FastRequest(Struct, forbid_unknown_fields=True, gc=False):
    """``serving.schema.PredictRequest``."""

    users: Annotated[list[FastUser], Meta(min_length=1, max_length=MAX_USERS)]
    now: _Time | None = None
    next_items: Annotated[int, Meta(ge=0, le=MAX_ITEMS)] = 0


_DECODER: Final = json.Decoder(FastRequest)


def decode_request(body: bytes | bytearray) -> tuple[FastRequest, datetime] | None:
    """Read a request for predictions.

    Returns:
        The request and the time of its latest event, or None where pydantic has to judge it.
    """
    if _NUL in body or (_LONG.search(body) and _FINE.search(body)):
        return None
    try:
        request = _DECODER.decode(body)
    except (MsgspecError, UnicodeDecodeError):
        return None
    events = [event for user in request.users for event in user.events]
    # Something returned, perhaps. As msgspec's bound, above 0 is above 0 or equal to it where
    # subnormal numbers count as 0, as torch can have it.
    if any(event.quantity is not None and event.quantity <= 0 for event in events):
        return None
    times = [event.ts for event in events]
    latest = max(times)
    times += [
        user.profile.signup_ts
        for user in request.users
        if user.profile is not None and user.profile.signup_ts is not None
    ]
    if request.now is not None:
        times.append(request.now)
    return (request, latest) if min(times) >= EARLIEST and max(times) < LATEST else None


def to_mapping(record: Any) -> dict[str, Any]:
    """Return the fields of an event or a profile, wherever it was read."""
    if isinstance(record, dict):
        return record
    return asdict(record) if isinstance(record, Struct) else vars(record)
