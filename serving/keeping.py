"""Answers that are the same for everybody, made once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from serving.middleware import App, Message, Receive, Send

DOCS: Final = "/docs.json"

_TEXT: Final = (
    "Predicts from recent events what every shopper does next: buy, search, fall silent, spend. "
    "`/` shows every call with an example."
)


def describe_ourselves(document: bytes) -> bytes:
    """Return an OpenAPI document that says whose it is: BentoML's tells of BentoML."""
    described = json.loads(document)
    version = described["info"]["version"]
    described["info"] = {
        "title": "Forecart",
        "description": _TEXT,
        # Of the Bento; what is served without one has none, and the field is needed.
        "version": "unpackaged" if version == "None" else version,
    }
    return json.dumps(described, separators=(",", ":")).encode()


class AnswerOnce:
    """ASGI middleware that keeps the answer to GET of an address.

    BentoML describes all calls anew for everybody who asks, which takes so long that a few clients
    would hold up all others.

    Args:
        app: the application inside.
        path: the address; its answer must be the same for everybody and for ever.
        change: what is done to the body of the answer.
    """

    def __init__(
        self, app: App, path: str = DOCS, change: Callable[[bytes], bytes] = describe_ourselves
    ) -> None:
        self.app = app
        self.path = path
        self.change = change
        self._kept: Sequence[Message] = ()
        # Who comes while the first answer is made waits for it.
        self._making = asyncio.Lock()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        asked = scope["type"] == "http" and scope["path"] == self.path
        if not asked or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        answer = self._kept
        if not answer:
            async with self._making:
                answer = self._kept or await self._make(scope, receive)
        for message in answer:
            own = dict(message)
            if "headers" in own:  # who is outside may add some
                own["headers"] = list(own["headers"])
            await send(own)

    async def _make(self, scope: MutableMapping[str, Any], receive: Receive) -> Sequence[Message]:
        """Have the application answer; a failure is not kept."""
        made: list[Message] = []

        async def take(message: Message) -> None:
            made.append(message)

        await self.app(scope, receive, take)
        if made and made[0].get("status") == HTTPStatus.OK:
            body = self.change(b"".join(message.get("body", b"") for message in made[1:]))
            headers = [(k, v) for k, v in made[0]["headers"] if k.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            start = {**made[0], "headers": headers}
            made = [start, {"type": "http.response.body", "body": body}]
            self._kept = made
        return made
