from __future__ import annotations

import asyncio
import re
from collections.abc import MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.collect import CollectRequest, parse_event
from serving.middleware import Message, Receive, Send
from serving.schema import (
    EraseRequest,
    ExplainRequest,
    PredictRequest,
    Profile,
    StoredRequest,
)
from serving.service import Forecart
from serving.welcome import CALLS, LINKS, ShowCalls, render

README = Path(__file__).parents[2] / "README.md"
BODIES: dict[str, Any] = {
    "POST /predict": PredictRequest,
    "POST /explain": ExplainRequest,
    "POST /events": CollectRequest,
    "PUT /users/ID": Profile,
    "POST /users/predict": StoredRequest,
    "POST /users/erase": EraseRequest,
}


def ask(path: str, method: str = "GET", digest: str = "sha256:1") -> tuple[Message, bytes]:
    sent: list[Message] = []

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def receive() -> Message:
        raise AssertionError("nothing is to be read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": []}
    asyncio.run(ShowCalls(app, lambda: digest)(scope, receive, send))
    start, end = sent
    return start, end["body"]


def test_it_loads_nothing_and_may_load_nothing() -> None:
    start, body = ask("/")
    page = body.decode()
    assert start["status"] == 200
    assert "http" not in page
    assert not re.search(r"<(script|img|link|iframe|object|form)|\b(src|url|@import)\b", page)
    policy = dict(start["headers"])[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_service_has_it() -> None:
    service: Any = Forecart
    assert ShowCalls in [middleware for middleware, _ in service.middlewares]


def test_every_call_of_the_readme_is_named() -> None:
    table = README.read_text(encoding="utf-8").split("## The service")[1].split("\n\n")[1]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    paths = {p for row in rows for p in re.findall(r"`(?:[A-Z]+ )?(/[^`]*)`", row)} - {"/"}
    assert len(paths) >= 13
    page = render("")
    missing = [p for p in paths if p not in page]
    assert missing == []


def test_examples_are_understood() -> None:
    examples = {call: body for call, _, body in CALLS if body}
    assert examples.keys() == BODIES.keys()
    read = {call: BODIES[call].model_validate_json(body) for call, body in examples.items()}
    clock = datetime(2026, 1, 1, tzinfo=UTC)
    assert all(parse_event(event, clock)[0] for event in read["POST /events"].events)


def test_the_model_is_told() -> None:
    assert b"sha256:1" in ask("/")[1]
    assert b"No model is loaded yet" in ask("/", digest="")[1]
    assert "<b>" not in render("<b>")
    assert {path for path, _ in LINKS} >= {"/docs.json", "/readyz", "/metrics"}


def test_the_head_has_no_body_and_all_else_passes() -> None:
    start, body = ask("/", "HEAD")
    assert body == b""
    assert int(dict(start["headers"])[b"content-length"]) > 1000
    assert ask("/docs.json")[1] == b"inside"
    assert ask("/", "POST")[1] == b"inside"
