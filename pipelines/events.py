"""The event schema: the one place that defines what an event is.

Everything that reads, checks or writes events takes column names, types and allowed
values from here, so that a change of the schema is a change of this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

import pyarrow as pa

from pipelines.errors import UserError


class EventType(StrEnum):
    """What a shopper did. The order is the integer code used in sequences (from 1)."""

    VIEW = "view"
    SEARCH = "search"
    ADD_TO_CART = "add_to_cart"
    REMOVE_FROM_CART = "remove_from_cart"
    WISHLIST = "wishlist"
    PURCHASE = "purchase"
    REFUND = "refund"
    REVIEW = "review"


EVENT_TYPES: Final[tuple[str, ...]] = tuple(EventType)

# 0 is padding in every coded column, so that a zeroed buffer never names an event.
EVENT_CODES: Final[dict[str, int]] = {name: code for code, name in enumerate(EVENT_TYPES, start=1)}

# What people call doing it.
VERBS: Final[dict[str, str]] = {
    EventType.VIEW: "look at something",
    EventType.SEARCH: "search",
    EventType.ADD_TO_CART: "put something into the cart",
    EventType.REMOVE_FROM_CART: "take something out of the cart",
    EventType.WISHLIST: "wish for something",
    EventType.PURCHASE: "buy",
    EventType.REFUND: "return something",
    EventType.REVIEW: "write a review",
}

TIMESTAMP: Final = pa.timestamp("us", tz="UTC")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)

EVENT_SCHEMA: Final = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("ts", TIMESTAMP, nullable=False),
        pa.field("event_type", pa.string(), nullable=False),
        pa.field("item_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("quantity", pa.float64()),
        pa.field("query", pa.string()),
        pa.field("session_id", pa.string()),
    ]
)

USER_SCHEMA: Final = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("age", pa.float64()),
        pa.field("gender", pa.string()),
        pa.field("region", pa.string()),
        pa.field("signup_ts", TIMESTAMP),
    ]
)

# Beyond these an amount is a mistake: events are put aside, and refused by the service.
MAX_PRICE: Final = 1e7
MAX_QUANTITY: Final = 1e6

ITEM_SCHEMA: Final = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),
    ]
)

REQUIRED_COLUMNS: Final[tuple[str, ...]] = tuple(f.name for f in EVENT_SCHEMA if not f.nullable)

# A pause of this length ends a session where the source names none (the web analytics
# convention, e.g. Google Analytics).
SESSION_GAP_SECONDS: Final = 30 * 60

# A longer identifier is damage (a shifted column, a payload), not a name.
MAX_ID_LENGTH: Final = 256
MAX_QUERY_LENGTH: Final = 1024


def is_quantity(event_type: str | None, quantity: float | None) -> bool:
    """Tell whether an event may have a quantity: what is returned may have one below 0."""
    if quantity is None or quantity > 0:
        return True
    return quantity < 0 and event_type in {EventType.PURCHASE, EventType.REFUND}


def to_us(ts: datetime | int) -> int:
    """Return the microseconds since the epoch of an aware datetime, or what is such already."""
    return (ts - EPOCH) // MICROSECOND if isinstance(ts, datetime) else int(ts)


def from_us(us: int) -> datetime:
    """Return the UTC datetime of microseconds since the epoch."""
    return EPOCH + us * MICROSECOND


def check_columns(names: Iterable[str], schema: pa.Schema, where: str) -> None:
    """Fail when a required column is missing or an unknown one is present.

    Args:
        names: column names found.
        schema: one of the schemas of this module.
        where: what was read, named in the error.

    Raises:
        UserError: naming the columns.
    """
    found = set(names)
    missing = [f.name for f in schema if not f.nullable and f.name not in found]
    if missing:
        raise UserError(f"{where}: missing column {', '.join(missing)}")
    unknown = sorted(found - set(schema.names))
    if unknown:
        raise UserError(f"{where}: unknown column {', '.join(unknown)}")
