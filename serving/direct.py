"""Answers predictions without the layers of a web framework.

A good request for predictions goes to the engine as it came, and the bytes of its answer go back as
they are: reading it twice and building objects of it would cost more than predicting. Whatever the
fast reader does not take goes on to the service, whose schema judges it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from bentoml.exceptions import BentoMLException

from serving.middleware import JSON, App, Receive, Send, refuse, replay

PATH: Final = "/predict"


class AnswerDirectly:
    """ASGI middleware of POST /predict; inside of ``LimitBody``, which hands on whole bodies.

    Args:
        app: the application inside.
        answer: returns the body of the answer to a body, or None where the application has to
            answer.
    """

    def __init__(self, app: App, answer: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        self.app = app
        self._answer = answer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        asked = (await receive()).get("body", b"")
        try:
            body = await self._answer(asked)
        except BentoMLException as error:
            await refuse(send, HTTPStatus(error.error_code), str(error))
            return
        if body is not None:
            length = str(len(body)).encode()
            headers = [(b"content-type", JSON.encode()), (b"content-length", length)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self.app(scope, replay(asked, receive), send)
