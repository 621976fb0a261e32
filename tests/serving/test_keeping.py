"""An answer that is made once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from serving.keeping import DOCS, AnswerOnce, describe_ourselves
from serving.middleware import Message, Receive, Send


class Slow:
    """An application that takes its time and counts; the first so many calls fail."""

    def __init__(self, failures: int = 0) -> None:
        self.calls = 0
        self.failures = failures

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.calls += 1
        status = 500 if self.calls <= self.failures else 200
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": str(self.calls).encode()})


async def receive() -> Message:
    raise AssertionError("nothing is to be read")


async def ask(app: AnswerOnce, path: str = DOCS, method: str = "GET") -> tuple[int, bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        if "headers" in message:
            message["headers"].append((b"added", b"outside"))
            assert [name for name, _ in message["headers"]].count(b"added") == 1
        sent.append(message)

    await app({"type": "http", "path": path, "method": method}, receive, send)
    start, end = sent
    return start["status"], end["body"]


def test_it_is_made_once_however_many_ask() -> None:
    async def run() -> None:
        inside = Slow()
        app = AnswerOnce(inside, change=bytes)
        together = await asyncio.gather(*(ask(app) for _ in range(50)))
        assert set(together) == {(200, b"1")}
        assert await ask(app) == (200, b"1")
        assert inside.calls == 1
        assert await ask(app, method="HEAD") == (200, b"2")
        assert await ask(app, path="/predict") == (200, b"3")

    asyncio.run(run())


def test_a_failure_is_not_kept() -> None:
    async def run() -> None:
        app = AnswerOnce(Slow(failures=1), change=bytes)
        assert await ask(app) == (500, b"1")
        assert await ask(app) == (200, b"2")
        assert await ask(app) == (200, b"2")

    asyncio.run(run())


def test_the_description_tells_of_this_service() -> None:
    contact = {"name": "BentoML Team", "email": "contact@bentoml.com"}
    document = {
        "info": {"title": "x", "description": "# BentoML", "version": "None", "contact": contact},
        "paths": {"/predict": {}},
    }
    found = json.loads(describe_ourselves(json.dumps(document).encode()))
    assert found["paths"] == document["paths"]
    assert "Bento" not in json.dumps(found)
    assert (found["info"]["title"], found["info"]["version"]) == ("Forecart", "unpackaged")
