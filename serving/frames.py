"""What the service and the processes that predict tell each other.

Messages are MessagePack in frames, each behind its length, over a pair of Unix sockets. Nothing
but the types below is ever built from what arrives.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from msgspec import Struct, msgpack

# Length of a frame's content, big-endian.
HEAD_BYTES: Final = 4


class Start(Struct, tag=True, array_like=True, frozen=True):
    """The first message: which model to load.

    Attributes:
        model: its folder.
        digest: that its files have to have; None = any.
        check: whether it has to reproduce the golden predictions beside it.
    """

    model: str
    digest: str | None
    check: bool


class Ready(Struct, tag=True, array_like=True, frozen=True):
    """The model is loaded.

    Attributes:
        digest: of its files.
    """

    digest: str


class Refused(Struct, tag=True, array_like=True, frozen=True):
    """What was asked for can't be done, by whoever asked.

    Attributes:
        problem: says why.
    """

    problem: str


class Call(Struct, array_like=True, frozen=True):
    """Shoppers that were checked already.

    Attributes:
        users: id, events and profile of each; events and profiles are dictionaries with times as
            datetimes or microseconds.
        now: from when to look ahead.
        next_items: how many of the items that may come next are told.
    """

    users: list[tuple[str, list[dict[str, Any]], dict[str, Any] | None]]
    now: datetime
    next_items: int = 0


class Predict(Struct, tag=True, array_like=True, frozen=True):
    """Calls to answer as one batch.

    Attributes:
        calls: bodies of requests, or shoppers that were checked already.
        clock: the service's time.
    """

    calls: list[bytes | Call]
    clock: datetime


class Predicted(Struct, tag=True, array_like=True, frozen=True):
    """The answers to a batch.

    Attributes:
        answers: the body of an answer for every call; None where the schema has to judge the
            request, empty where predicting failed.
        users: shoppers in all.
        probabilities: target -> of every shopper.
    """

    answers: list[bytes | None]
    users: int
    probabilities: dict[str, list[float]]


class Explain(Struct, tag=True, array_like=True, frozen=True):
    """A prediction to explain.

    Attributes:
        call: holds one shopper.
        target: a probability's name.
    """

    call: Call
    target: str


class Explained(Struct, tag=True, array_like=True, frozen=True):
    """An explanation.

    Attributes:
        answer: the body.
    """

    answer: bytes


Request = Predict | Explain
Reply = Ready | Refused | Predicted | Explained

_ENCODER: Final = msgpack.Encoder()
_REQUESTS: Final = msgpack.Decoder(Start | Request)
_REPLIES: Final = msgpack.Decoder(Reply)


def pack(message: Start | Request | Reply) -> bytes:
    """Return a message as a frame."""
    content = _ENCODER.encode(message)
    return len(content).to_bytes(HEAD_BYTES, "big") + content


def read_length(head: bytes) -> int:
    """Return how many bytes come behind the head of a frame."""
    return int.from_bytes(head, "big")


def unpack_request(content: bytes) -> Start | Request:
    """Return what the service asks for.

    Raises:
        msgspec.MsgspecError: it is none of the messages.
    """
    message: Start | Request = _REQUESTS.decode(content)
    return message


def unpack_reply(content: bytes) -> Reply:
    """Return what a process answers.

    Raises:
        msgspec.MsgspecError: it is none of the messages.
    """
    message: Reply = _REPLIES.decode(content)
    return message
