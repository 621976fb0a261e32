"""What is told of every request: when, which route, what came of it, how long it took.

Nothing in it tells of a person: no address, no body, no query, and of paths only those of the
service, since anything else is a client's text. Prometheus is told always, and a line of JSON is
written where FORECART_ACCESS_LOG is 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from serving.metrics import count_request
from serving.middleware import App, Message, Receive, Send

ACCESS_VARIABLE: Final = "FORECART_ACCESS_LOG"
CALLS: Final = frozenset({"/predict", "/explain", "/events", "/users/predict", "/users/erase"})
USER: Final = "/users/{user_id}"
PARTS: Final = frozenset({"prediction", "next-items", "explanation"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What answers a probe every few seconds is no news.
SILENT: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})


class ObserveRequests:
    """Counts every request, and writes a line for it.

    Args:
        app: the application inside.
        write: takes a line; None = standard output, where FORECART_ACCESS_LOG is 1.
        count: takes route, status and seconds; None = what Prometheus reads.
    """

    def __init__(
        self,
        app: App,
        write: Callable[[str], object] | None = None,
        count: Callable[[str, int, float], object] | None = None,
    ) -> None:
        self.app = app
        self._count = count or count_request
        if write is None and os.environ.get(ACCESS_VARIABLE) == "1":
            write = _write
        self._write = write

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in SILENT:
            await self.app(scope, receive, send)
            return
        # A client that hangs up gets no answer; 499 is what proxies write for it.
        status, size = 499, 0
        began = time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            seconds = time.perf_counter() - began
            route = name_route(scope["method"], scope["path"])
            self._count(route, status, seconds)
            if self._write is not None:
                line = {
                    "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "method": scope["method"] if scope["method"] in _METHODS else "other",
                    "route": route,
                    "status": status,
                    "bytes": size,
                    "ms": round(seconds * 1000, 1),
                }
                self._write(json.dumps(line))


def name_route(method: str, path: str) -> str:
    """Return the route of a request, with nothing that a client wrote in it."""
    if path in CALLS or path in SILENT:
        return path
    if not path.startswith("/users/"):
        return "other"
    part = path.rpartition("/")[2]
    return f"{USER}/{part}" if method == "GET" and part in PARTS else USER


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
