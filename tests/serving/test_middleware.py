from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from bentoml.exceptions import BadInput, BentoMLException, InternalServerError
from pydantic import BaseModel, ValidationError

from serving.middleware import (
    DropClientErrors,
    LimitBody,
    NotAvailable,
    ShapeErrors,
    replay,
)


def call(
    app: Any,
    chunks: list[bytes],
    *,
    headers: dict[str, str] | None = None,
    method: str = "POST",
) -> tuple[int, dict[str, str], bytes]:
    """Send one request to an ASGI application."""
    left = list(chunks)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"Content-Type": "application/json"} | (headers or {})
    pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": method, "path": "/predict", "headers": pairs}
    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    head = {k.decode(): v.decode() for k, v in start["headers"]}
    return start["status"], head, b"".join(m.get("body", b"") for m in rest)


def answer(status: int, body: bytes) -> Any:
    """An application that reads the request and answers with fixed content, in two pieces."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        echo = body or message["body"]
        headers = [(b"content-length", str(len(echo)).encode()), (b"server", b"test")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": echo[:3], "more_body": True})
        await send({"type": "http.response.body", "body": echo[3:]})

    return app


def test_a_body_within_the_limit_is_handed_on_whole() -> None:
    app = LimitBody(answer(200, b""), max_bytes=10)
    assert call(app, [b"12345", b"67890"])[2] == b"1234567890"


@pytest.mark.parametrize(
    ("chunks", "length"),
    [([b"12345", b"678901"], None), ([b"12345678901"], "11"), ([b"1"], "11"), ([b"1" * 11], "2")],
)
def test_a_larger_body_is_refused_whatever_length_it_announces(
    chunks: list[bytes], length: str | None
) -> None:
    app = LimitBody(answer(200, b""), max_bytes=10)
    headers = {} if length is None else {"Content-Length": length}
    status, head, body = call(app, chunks, headers=headers)
    assert status == 413
    assert head["content-length"] == str(len(body))
    assert json.loads(body)["error"]["code"] == "too_large"


def test_a_body_that_does_not_come_is_waited_for_no_longer() -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    app = LimitBody(answer(200, b""), max_bytes=10, seconds=0.01)
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


def test_many_large_bodies_at_once_are_refused_and_small_ones_are_not() -> None:
    async def run() -> tuple[list[int], list[int], int]:
        never = asyncio.Event()
        app = LimitBody(answer(200, b"done"), max_bytes=1 << 20, max_held=4 << 20)

        async def ask(size: int, *, whole: bool, announced: bool = True) -> int:
            sent: list[Any] = []
            left = [{"type": "http.request", "body": bytes(size), "more_body": not whole}]

            async def receive() -> Any:
                if not left:
                    await never.wait()
                return left.pop()

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"content-type", b"application/json")]
            if announced:
                headers.append((b"content-length", str(size + (not whole)).encode()))
            scope = {"type": "http", "method": "POST", "path": "/events", "headers": headers}
            await app(scope, receive, send)
            return int(sent[0]["status"])

        slow = [asyncio.create_task(ask((1 << 20) - 1, whole=False)) for _ in range(5)]
        await asyncio.sleep(0)
        beyond = [await ask(1 << 20, whole=True, announced=told) for told in (True, False)]
        small = [await ask(1 << 16, whole=True) for _ in range(3)]
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return beyond, small, await ask(1 << 20, whole=True)

    assert asyncio.run(run()) == ([429, 429], [200, 200, 200], 200)


@pytest.mark.parametrize("head", [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")])
def test_a_body_without_a_media_type_is_refused(head: tuple[bytes, bytes]) -> None:
    """As a page of another site may have a browser send it."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/users/erase", "headers": [head]}
    asyncio.run(LimitBody(answer(200, b""), max_bytes=10)(scope, send, send))
    assert sent[0]["status"] == 415


@pytest.mark.parametrize("length", [b"0", b"00", None])
def test_no_body_needs_no_media_type(length: bytes | None) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": "/users/erase", "headers": headers}
    asyncio.run(LimitBody(answer(200, b"done"), max_bytes=10)(scope, receive, send))
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_media_types_all_have_to_be_json(order: tuple[int, int]) -> None:
    types = [b"application/json", b"multipart/form-data; boundary=x"]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", types[i]) for i in order]
    scope = {"type": "http", "method": "POST", "path": "/events", "headers": headers}
    asyncio.run(LimitBody(answer(200, b""), max_bytes=10)(scope, send, send))
    assert sent[0]["status"] == 415


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain; application/json", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
def test_a_media_type_may_be_written_as_standards_allow(media_type: str, status: int) -> None:
    app = LimitBody(answer(200, b""), max_bytes=10)
    found, _, body = call(app, [b"{}"], headers={"Content-Type": media_type})
    assert found == status
    assert status == 200 or json.loads(body)["error"]["code"] == "unsupported_media_type"


def test_a_client_that_leaves_in_the_middle_of_a_body_asks_nothing() -> None:
    called: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    left = [{"type": "http.request", "body": b"12", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return left.pop(0)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/events", "headers": headers}
    limit = LimitBody(app, max_bytes=10)
    asyncio.run(limit(scope, receive, app))
    assert called == []
    assert left == []


def test_reading_stops_at_the_limit() -> None:
    left = [b"1" * 8] * 1000
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/events", "headers": headers}
    asyncio.run(LimitBody(answer(200, b""), max_bytes=10)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert len(left) == 998


def test_other_methods_pass_untouched() -> None:
    app = LimitBody(answer(200, b"pong"), max_bytes=1)
    assert call(app, [b"12345"], method="GET")[2] == b"pong"


def test_what_is_no_request_passes_untouched() -> None:
    passed: list[Any] = []

    async def app(*parts: Any) -> None:
        passed.append(parts)

    parts = ({"type": "lifespan"}, app, app)
    asyncio.run(LimitBody(app, max_bytes=1)(*parts))
    asyncio.run(ShapeErrors(app)(*parts))
    assert passed == [parts, parts]


def test_a_length_that_is_no_number_is_left_to_the_body_itself() -> None:
    app = LimitBody(answer(200, b""), max_bytes=10)
    assert call(app, [b"{}"], headers={"Content-Length": "two"})[0] == 200
    assert call(app, [b"1" * 11], headers={"Content-Length": "two"})[0] == 413


def test_who_reads_on_after_the_body_is_told_that_the_client_has_left() -> None:
    read: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read.extend([await receive(), await receive()])
        await answer(200, b"done")(scope, replay(b"", receive), send)

    call(LimitBody(app, max_bytes=10), [b"12", b"34"])
    assert read == [
        {"type": "http.request", "body": b"1234", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_an_error_has_one_length_and_one_type() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(ShapeErrors(answer(404, b"Not Found"))(scope, receive, send))
    start, end = sent
    names = sorted(name for name, _ in start["headers"])
    assert names == [b"content-length", b"content-type", b"server"]
    assert dict(start["headers"])[b"content-length"] == str(len(end["body"])).encode()


def test_success_is_not_touched() -> None:
    status, head, body = call(ShapeErrors(answer(200, b'{"error": "no"}')), [b""])
    assert (status, head["server"], body) == (200, "test", b'{"error": "no"}')


@pytest.mark.parametrize(
    ("status", "body", "expected", "code", "field"),
    [
        (400, "", 400, "bad_request", None),
        (401, "", 401, "unauthorized", None),
        (405, "", 405, "method_not_allowed", None),
        (408, "", 408, "request_timeout", None),
        (413, "", 413, "too_large", None),
        (415, "", 415, "unsupported_media_type", None),
        (429, "", 429, "too_many_requests", None),
        (431, "", 431, "head_too_large", None),
        (500, [], 500, "internal_error", None),
        (504, "", 504, "timeout", None),
        (
            400,
            {"detail": [{"type": "missing", "loc": ["a", 1], "msg": "m"}]},
            422,
            "invalid_request",
            "a.1",
        ),
        (
            400,
            {"detail": [{"type": "json_invalid", "loc": [], "msg": "m"}]},
            400,
            "malformed_json",
            None,
        ),
        (400, [{"error": {"code": "c", "message": "m", "field": "f"}}], 400, "c", "f"),
        (422, {"error": {"code": "c", "message": "m", "field": None}}, 422, "c", None),
        (404, "Not Found", 404, "not_found", None),
        (500, {"error": "secret"}, 500, "internal_error", None),
        (503, "down", 503, "unavailable", None),
        (418, "teapot", 418, "http_418", None),
    ],
)
def test_errors_get_one_form(
    status: int, body: Any, expected: int, code: str, field: str | None
) -> None:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    found, head, shaped = call(ShapeErrors(answer(status, content)), [b""])
    error = json.loads(shaped)["error"]
    assert found == expected
    assert head["content-type"] == "application/json"
    assert head["server"] == "test"
    assert error.keys() == {"code", "message", "field"}
    assert error["field"] == field
    assert error["code"] == code
    assert error["message"]
    assert "secret" not in error["message"]


def test_what_the_service_says_of_a_request_reaches_the_client() -> None:
    def ask(status: int) -> dict[str, Any]:
        _, _, body = call(ShapeErrors(answer(status, b'{"error": "no such user"}')), [b""])
        error: dict[str, Any] = json.loads(body)["error"]
        return error

    assert ask(404) == {"code": "not_found", "message": "no such user", "field": None}
    # Of an accident nothing is told.
    assert ask(500)["message"] == "the service failed; see its log"


def test_what_is_not_available_is_told_to_the_client() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise NotAvailable("erase again")
        except BentoMLException as error:
            inner = answer(error.error_code.value, b'{"error": "see the log"}')
            await inner(scope, receive, send)

    status, _, body = call(ShapeErrors(app), [b""])
    assert status == 503
    assert json.loads(body)["error"]["message"] == "erase again"


def test_mistakes_of_clients_are_not_logged_and_others_are() -> None:
    class Model(BaseModel):
        x: int

    def log(error: Exception) -> str | None:
        record = logging.LogRecord(
            "n", logging.ERROR, "p", 1, "on %s", ("/x",), (type(error), error, None)
        )
        written = DropClientErrors().filter(record)
        return logging.Formatter().format(record) if written else None

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"x": "secret"})
    assert log(caught.value) is None
    assert log(BadInput("spend cannot be explained")) is None
    assert log(NotAvailable("erase again")) == "on /x: erase again"
    assert "ValueError: broken" in str(log(ValueError("broken")))
    assert "InternalServerError: broken" in str(log(InternalServerError("broken")))
