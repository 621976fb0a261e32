"""What stands between the server and the service: limits on bodies, one form of errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from pydantic import ValidationError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

JSON: Final = "application/json"
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})

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
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}


class LimitBody:
    """Refuses bodies that are too large or no JSON before anything reads them.

    The body is read here up to the limit and handed on as one message, so that a client that
    announces no length, or a wrong one, is stopped as well.

    Args:
        app: the application inside.
        max_bytes: largest body.
        seconds: until it has to be there.
    """

    def __init__(self, app: App, max_bytes: int, seconds: float = 10.0) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # All of them: who reads the body may look at another one than is looked at here.
        told = [value for name, value in scope["headers"] if name == b"content-type"]
        if any(value.split(b";")[0].strip().lower() != JSON.encode() for value in told):
            await refuse(send, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send {JSON}")
            return
        length = headers.get(b"content-length", b"0")
        too_large = length.isdigit() and int(length) > self.max_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                gone = not too_large and not await self._read(receive, body)
        except TimeoutError:
            text = f"the body did not come within {self.seconds:g} seconds"
            await refuse(send, HTTPStatus.REQUEST_TIMEOUT, text)
            return
        if gone:
            return
        if too_large or len(body) > self.max_bytes:
            text = f"the body is larger than {self.max_bytes} bytes; send fewer users in a call"
            await refuse(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
            return
        await self.app(scope, replay(bytes(body), receive), send)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Read a body up to the limit; return whether the client is still there."""
        more = True
        while more and len(body) <= self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return True


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

        async def shape(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    await _send_error(send, start, _describe(start["status"], bytes(body)))

        await self.app(scope, receive, shape)


def _describe(status: int, body: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and error for what BentoML answered."""
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


async def refuse(
    send: Send,
    status: HTTPStatus,
    message: str,
    headers: Sequence[tuple[bytes, bytes]] = (),
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


class DropValidationErrors(logging.Filter):
    """Keeps refused requests out of the log: their text quotes what shoppers did."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be written."""
        return not (record.exc_info and isinstance(record.exc_info[1], ValidationError))
