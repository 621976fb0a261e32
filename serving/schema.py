"""What the service accepts and answers. Strict: unknown fields and wrong types are refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Final, Self, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import ExtraValues
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipelines.events import (
    MAX_ID_LENGTH,
    MAX_PRICE,
    MAX_QUANTITY,
    MAX_QUERY_LENGTH,
    EventType,
    is_quantity,
)
from serving.limits import EARLIEST, LATEST, MAX_EVENTS, MAX_ITEMS, MAX_USERS, settle_now

# A body beyond this is refused unread.
MAX_BODY_BYTES: Final = 8 << 20


def _check_time(value: datetime) -> datetime:
    if not EARLIEST <= value < LATEST:
        raise ValueError(f"time must lie between {EARLIEST.year} and {LATEST.year}")
    return value


def _check_text(value: str) -> str:
    # Databases and C libraries end a text here.
    if "\0" in value:
        raise ValueError("text must not hold the character NUL")
    return value


Time = Annotated[AwareDatetime, AfterValidator(_check_time)]
Identifier = Annotated[
    str, Field(min_length=1, max_length=MAX_ID_LENGTH), AfterValidator(_check_text)
]


def _check_id(value: str) -> str:
    # Some databases take "ann " for "ann", and some frameworks end an address at a new line.
    if value != value.strip(" ") or any(unicodedata.category(mark) == "Cc" for mark in value):
        raise ValueError("an id must not begin or end with a blank, nor hold control characters")
    return value


# Of what is kept.
StoredId = Annotated[Identifier, AfterValidator(_check_id)]
Text = Annotated[str, Field(max_length=MAX_ID_LENGTH), AfterValidator(_check_text)]
Target = Annotated[Text, Field(description="A probability's name, such as purchase_14d.")]


class Strict(BaseModel):
    """Base of requests: no unknown field, no coercion, no NaN or infinity.

    An answer names the first mistake, so no request may cost more by having many: lists are read up
    to the first item that is wrong, and of unknown fields one is reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def model_validate_json(
        cls, json_data: str | bytes | bytearray, *, extra: ExtraValues | None = None, **options: Any
    ) -> Self:
        """Read JSON.

        Raises:
            ValidationError: it is not what is asked for; at most one error is about an unknown
                field.
        """
        # Where unknown fields are forbidden pydantic reports each: a gigabyte for a body of them.
        read = super().model_validate_json(json_data, extra=extra or "allow", **options)
        unknown = find_unknown(read) if extra is None else None
        if unknown is None:
            return read
        problem = InitErrorDetails(type="extra_forbidden", loc=unknown, input=None)
        raise ValidationError.from_exception_data(cls.__name__, [problem], input_type="json")


def find_unknown(value: Any) -> tuple[str | int, ...] | None:
    """Return where the first unknown field is in what was read with all of them allowed."""
    places: Iterable[tuple[str | int, Any]]
    if isinstance(value, BaseModel):
        nested = _find_nested(type(value))
        extra = value.model_extra
        places = ((name, getattr(value, name)) for name in nested) if nested else ()
    else:
        places, extra = enumerate(value), None
    for name, inner in places:
        found = None if inner is None else find_unknown(inner)
        if found is not None:
            return name, *found
    return (next(iter(extra)),) if extra else None


@cache
def _find_nested(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields that hold models: most have none, and there are many of them."""
    fields = model.model_fields.items()
    return tuple(name for name, field in fields if _holds_model(field.annotation))


def _holds_model(annotation: Any) -> bool:
    parts = get_args(annotation)
    if not parts:
        return isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return any(_holds_model(part) for part in parts)


class Event(Strict):
    """Something that a shopper did; the fields are those of the event schema."""

    event_type: EventType
    ts: Time = Field(description="When it happened, ISO 8601 with a time zone.")
    event_id: Identifier | None = None
    item_id: Text | None = None
    category: Text | None = None
    brand: Text | None = None
    price: Annotated[float, Field(ge=0, le=MAX_PRICE)] | None = Field(
        default=None, description="Unit price."
    )
    quantity: Annotated[float, Field(ge=-MAX_QUANTITY, le=MAX_QUANTITY)] | None = Field(
        default=None, description="Above 0; a purchase of less than 0 is a refund."
    )
    query: (
        Annotated[str, Field(max_length=MAX_QUERY_LENGTH), AfterValidator(_check_text)] | None
    ) = Field(default=None, description="The search text.")
    session_id: Text | None = None

    @field_validator("quantity")
    @classmethod
    def _check_quantity(cls, value: float | None, info: ValidationInfo) -> float | None:
        # Training sets such events aside, so no model knows them.
        if not is_quantity(info.data.get("event_type"), value):
            raise ValueError("quantity must be above 0; below 0 of purchases and refunds alone")
        return value


class Profile(Strict):
    """What is known of a shopper beside the events."""

    age: Annotated[float, Field(ge=0, le=150)] | None = None
    gender: Text | None = None
    region: Text | None = None
    signup_ts: Time | None = None


class User(Strict):
    """A shopper with recent events, in any order."""

    user_id: Identifier
    profile: Profile | None = None
    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS, fail_fast=True)]


class PredictRequest(Strict):
    """Shoppers to predict, and from when on."""

    users: Annotated[list[User], Field(min_length=1, max_length=MAX_USERS, fail_fast=True)]
    now: Time | None = Field(
        default=None,
        description="Predictions look ahead from here; all events lie before. Default: the "
        "service's clock.",
    )
    next_items: Annotated[int, Field(ge=0, le=MAX_ITEMS)] = Field(
        default=0, description="How many of the items that may come next are told."
    )


class NextItem(BaseModel):
    """An item that may come next."""

    item_id: str
    probability: float


class Prediction(BaseModel):
    """What a shopper is expected to do. Keys are target names such as purchase_14d."""

    user_id: str
    probabilities: dict[str, float]
    expected_spend: dict[str, float] = Field(
        description="Price times quantity of purchases, before returns, in the log's currency."
    )
    next_purchase: datetime | None = Field(
        default=None,
        description="Until when a purchase is as likely as not; null: not within the longest "
        "horizon.",
    )
    next_items: list[NextItem] = []


class PredictResponse(BaseModel):
    """Predictions in the order of the request."""

    model: str = Field(description="Digest of the model's files.")
    now: datetime
    predictions: list[Prediction]


class StoredRequest(Strict):
    """Shoppers to predict from what was collected of them, and from when on."""

    user_ids: Annotated[list[StoredId], Field(min_length=1, max_length=MAX_USERS, fail_fast=True)]
    now: Time | None = Field(default=None, description="Default: the service's clock.")
    next_items: Annotated[int, Field(ge=0, le=MAX_ITEMS)] = 0


class EraseRequest(Strict):
    """A shopper who wants to be forgotten."""

    user_id: StoredId


class EraseResponse(BaseModel):
    """What was deleted."""

    user_id: str
    events: int
    profile: bool
    exported: int = Field(description="Rows in the exports that the service knows of.")


class ExplainRequest(Strict):
    """A prediction to explain: of a shopper in the request, or of one who was collected."""

    user: User | None = None
    user_id: StoredId | None = Field(
        default=None, description="Instead of `user`: whose collected events are explained."
    )
    target: Target
    now: Time | None = None

    @model_validator(mode="after")
    def _check_one(self) -> ExplainRequest:
        if (self.user is None) == (self.user_id is None):
            raise ValueError("send either user or user_id")
        return self


class Question(BaseModel):
    """Base of the parameters of an address: texts that are read as what they stand for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    now: Time | None = Field(default=None, description="Default: the service's clock.")


class PredictionQuestion(Question):
    """What to tell of a shopper."""

    next_items: Annotated[int, Field(ge=0, le=MAX_ITEMS)] = 0


class ItemsQuestion(Question):
    """Which items to tell."""

    count: Annotated[int, Field(ge=1, le=MAX_ITEMS)] = 10


class ExplanationQuestion(Question):
    """What to explain."""

    target: Target


class StoredPrediction(Prediction):
    """A shopper's prediction, from what was collected."""

    model: str = Field(description="Digest of the model's files.")
    now: datetime


class StoredItems(BaseModel):
    """The items that may come next, and when a purchase is to be expected."""

    model: str
    now: datetime
    user_id: str
    next_purchase: datetime | None
    next_items: list[NextItem]


class StoredProfile(BaseModel):
    """What is known of a shopper from now on."""

    user_id: str
    profile: Profile


class EventEffect(BaseModel):
    """What an event adds to the log odds of the target."""

    ts: datetime
    event_type: str
    item_id: str | None = None
    query: str | None = None
    effect: float


class FeatureEffect(BaseModel):
    """What a count, recency or other number of a history adds to the log odds."""

    feature: str
    effect: float


class ExplainResponse(BaseModel):
    """What moved a prediction, the strongest first (integrated gradients, in log odds)."""

    model: str
    now: datetime
    target: str
    probability: float
    start: float = Field(description="Log odds of a shopper of whom nothing is known.")
    end: float = Field(description="Log odds as seen, not calibrated.")
    gap: float = Field(description="By how much the effects miss the difference of both.")
    events: list[EventEffect]
    features: list[FeatureEffect]


def resolve_now(request: PredictRequest, clock: datetime) -> datetime:
    """Return the time from which to look ahead, as ``settle_now`` does.

    Args:
        request: users with events.
        clock: the service's time, UTC.

    Raises:
        ValidationError: an event lies at or after ``now``, or further ahead than clocks differ.
    """
    places = [
        (event.ts, ("users", i, "events", j, "ts"))
        for i, user in enumerate(request.users)
        for j, event in enumerate(user.events)
    ]
    settled = settle_now(max(ts for ts, _ in places), request.now, clock)
    if settled is not None:
        return settled
    # The first that is too late by itself.
    late = ((ts, field) for ts, field in places if settle_now(ts, request.now, clock) is None)
    ts, field = next(late)
    raise _refuse_future(field, ts, request.now or clock)


def _refuse_future(field: tuple[str | int, ...], value: datetime, now: datetime) -> ValidationError:
    problem = PydanticCustomError(
        "event_in_future", "Event must lie before now ({now})", {"now": now.isoformat()}
    )
    return ValidationError.from_exception_data(
        PredictRequest.__name__, [InitErrorDetails(type=problem, loc=field, input=value)]
    )
