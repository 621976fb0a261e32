"""What stands between the server and the service: limits on bodies, one form of errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final

from bentoml.exceptions import BentoMLException, ServiceUnavailable
from pydantic import ValidationError

# The first status of an error that is the service's own.
_OURS: Final = HTTPStatus.INTERNAL_SERVER_ERROR

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# Status and text of a refusal, and headers.
Headers = Sequence[tuple[bytes, bytes]]
Problem = tuple[HTTPStatus, str] | tuple[HTTPStatus, str, Headers]

JSON: Final = "application/json"
_TYPE: Final = JSON.encode()
LATER: Final = ((b"retry-after", b"1"),)
WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})

# Bodies of all requests together that are kept in memory. What is small is let in beyond it: a few
# clients that send much at once must not lock out all the others.
MAX_HELD_BYTES: Final = 64 << 20
SMALL_BYTES: Final = 1 << 16

# What the service has said of a request that it cannot answer now.
_SAID: Final[ContextVar[list[str] | None]] = ContextVar("said", default=None)

# Names that clients may rely on; the phrases of http.HTTPStatus change between Pythons.
CODES: Final = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    431: "head_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}


class LimitBody:
    """Refuses bodies that are too large, too many or no JSON before anything reads them.

    The body is read here up to the limit and handed on as one message, so that a client that
    announces no length, or a wrong one, is stopped as well.

    Args:
        app: the application inside.
        max_bytes: largest body.
        max_held: bytes of all bodies together; beyond them only small ones are taken.
        seconds: until it has to be there.
    """

    def __init__(
        self, app: App, max_bytes: int, *, max_held: int = MAX_HELD_BYTES, seconds: float = 10.0
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_held = max_held
        self.seconds = seconds
        # Bytes that have come, of all requests that are not answered.
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["method"] not in WITH_BODY:
            await self.app(scope, receive, send)
            return
        problem = self._judge_head(scope["headers"])
        if problem is not None:
            await refuse(send, *problem)
            return
        body = _Body()
        try:
            problem = await self._read(receive, body)
            if problem is not None:
                await refuse(send, *problem)
            elif body.whole:
                await self.app(scope, replay(body.take(), receive), send)
        finally:
            self._held -= body.size

    def _judge_head(self, headers: Headers) -> Problem | None:
        found = dict(headers)
        length = found.get(b"content-length", b"0")
        is_sent = b"transfer-encoding" in found or length.strip(b"0") != b""
        # All of them: who reads the body may look at another one than is looked at here. And one
        # at least: without, a page of another site may have a browser send it.
        told = [value for name, value in headers if name == b"content-type"]
        is_other = any(value.split(b";")[0].strip().lower() != _TYPE for value in told)
        if is_other or (is_sent and not told):
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send a body with Content-Type: {JSON}"
        return self._judge_size(int(length)) if length.isdigit() else None

    def _judge_size(self, size: int) -> Problem | None:
        if size > self.max_bytes:
            text = f"the body is larger than {self.max_bytes} bytes; send fewer users in a call"
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text
        if size > SMALL_BYTES and self._held > self.max_held:
            text = "too much is being sent at once; send again in a moment"
            return HTTPStatus.TOO_MANY_REQUESTS, text, LATER
        return None

    async def _read(self, receive: Receive, body: _Body) -> Problem | None:
        """Read a body up to the limits; return what is wrong with it."""
        try:
            async with asyncio.timeout(self.seconds):
                while not body.whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    self._held += len(part)
                    body.add(part, whole=not message.get("more_body", False))
                    problem = self._judge_size(body.size)
                    if problem is not None:
                        return problem
        except TimeoutError:
            text = f"the body did not come within {self.seconds:g} seconds"
            return HTTPStatus.REQUEST_TIMEOUT, text
        return None


class _Body:
    """A body that is being read.

    Attributes:
        size: of what has come.
        whole: whether that is all.
    """

    def __init__(self) -> None:
        self.size = 0
        self.whole = False
        self._content = bytearray()

    def add(self, part: bytes, *, whole: bool) -> None:
        """Take what has come next."""
        self._content += part
        self.size += len(part)
        self.whole = whole

    def take(self) -> bytes:
        """Return the content, which is not kept."""
        content = bytes(self._content)
        self._content.clear()
        return content


def replay(body: bytes, receive: Receive) -> Receive:
    """Return what hands on a body that was read already as one message, then what follows it."""
    read = False

    async def hand_on() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return hand_on


class NotAvailable(ServiceUnavailable):  # type: ignore[misc]  # BentoML is not typed
    """What the service cannot do now; the client is told why, which BentoML keeps to its log.

    Args:
        text: for the client.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        said = _SAID.get()
        if said is not None:
            said.append(text)


class ShapeErrors:
    """Gives every error of the service one form: {"error": {"code", "message", "field"}}.

    Args:
        app: the application inside.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()
        said: list[str] = []
        _SAID.set(said)

        async def shape(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    error = _describe(start["status"], bytes(body), said)
                    await _send_error(send, start, error)

        await self.app(scope, receive, shape)


def _describe(status: int, body: bytes, reasons: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Return the status and error for what BentoML answered, and the service gave as reasons."""
    if status == HTTPStatus.SERVICE_UNAVAILABLE and reasons:
        return status, _error(_name(status), reasons[-1])
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]  # so BentoML wraps errors that a method raised
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        return status, answer["error"]
    if isinstance(answer, dict) and isinstance(answer.get("detail"), list) and answer["detail"]:
        first = answer["detail"][0]
        if first["type"] == "json_invalid":
            return HTTPStatus.BAD_REQUEST, _error("malformed_json", first["msg"])
        field = ".".join(str(part) for part in first["loc"]) or None
        return HTTPStatus.UNPROCESSABLE_ENTITY, _error("invalid_request", first["msg"], field)
    said = answer.get("error") if isinstance(answer, dict) else None
    # What the service says of itself is for the client; of an accident nothing is told.
    if isinstance(said, str) and status != HTTPStatus.INTERNAL_SERVER_ERROR:
        return status, _error(_name(status), said)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return status, _error(_name(status), "the service failed; see its log")
    known = HTTPStatus(status)
    return status, _error(_name(status), known.description or known.phrase)


def _error(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "field": field}


def _name(status: int) -> str:
    return CODES.get(status, f"http_{status}")


def describe_refusal(status: HTTPStatus, message: str) -> bytes:
    """Return the body of a refusal."""
    return json.dumps({"error": _error(_name(status), message)}).encode()


async def refuse(
    send: Send,
    status: HTTPStatus,
    message: str,
    headers: Headers = (),
) -> None:
    """Answer with an error in the service's form."""
    start = {"type": "http.response.start", "headers": list(headers)}
    await _send_error(send, start, (status, _error(_name(status), message)))


async def _send_error(send: Send, start: Message, error: tuple[int, dict[str, Any]]) -> None:
    status, content = error
    body = json.dumps({"error": content}).encode()
    replaced = (b"content-length", b"content-type")
    headers = [(k, v) for k, v in start["headers"] if k.lower() not in replaced]
    headers += [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    await send({**start, "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})


class DropClientErrors(logging.Filter):
    """Keeps refused requests out of the log: their text quotes what shoppers did.

    They are the clients' mistakes, which the metrics count; what the service cannot do now is told
    in a line, without where it happened.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be written."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NotAvailable):
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: {error}", (), None
        refused = isinstance(error, BentoMLException) and error.error_code < _OURS
        return not (refused or isinstance(error, ValidationError))
