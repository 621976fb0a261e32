"""Answers that are the same for everybody, made once."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from serving.middleware import App, Message, Receive, Send

DOCS: Final = "/docs.json"


class AnswerOnce:
    """ASGI middleware that keeps the answer to GET of an address.

    BentoML describes all calls anew for everybody who asks, which takes so long that a few clients
    would hold up all others.

    Args:
        app: the application inside.
        path: the address; its answer must be the same for everybody and for ever.
    """

    def __init__(self, app: App, path: str = DOCS) -> None:
        self.app = app
        self.path = path
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
            self._kept = made
        return made
