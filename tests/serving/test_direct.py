from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from bentoml.exceptions import BentoMLException

from serving.direct import AnswerDirectly
from serving.middleware import Message, Receive, Send

Answer = tuple[int, bytes]


def ask(body: bytes, *, path: str = "/predict", method: str = "POST") -> tuple[Answer, list[bytes]]:
    """Return the answer, and the bodies that came through to the application inside."""
    passed: list[bytes] = []
    sent: list[Message] = []

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        passed.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 422, "headers": []})
        await send({"type": "http.response.body", "body": b"judged"})

    async def answer(body: bytes) -> bytes | None:
        if body == b"busy":
            raise BentoMLException("later", error_code=HTTPStatus.TOO_MANY_REQUESTS)
        return b'{"model": 1}' if body == b"good" else None

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": []}
    asyncio.run(AnswerDirectly(app, answer)(scope, receive, send))
    start, end = sent
    return (start["status"], end["body"]), passed


def test_a_good_request_is_answered_with_the_bytes_that_it_gets() -> None:
    assert ask(b"good") == ((200, b'{"model": 1}'), [])


def test_what_is_not_read_fast_is_judged_inside() -> None:
    assert ask(b"odd") == ((422, b"judged"), [b"odd"])


def test_other_routes_pass() -> None:
    assert ask(b"good", path="/events") == ((422, b"judged"), [b"good"])
    assert ask(b"good", method="PUT") == ((422, b"judged"), [b"good"])


def test_a_refusal_has_the_form_of_errors() -> None:
    (status, body), passed = ask(b"busy")
    assert status == 429
    error = {"code": "too_many_requests", "message": "later", "field": None}
    assert json.loads(body) == {"error": error}
    assert passed == []
