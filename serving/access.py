"""A line of JSON for every request: when, which route, what came of it, how long it took.

Nothing in it tells of a person: no address, no body, no query, and of paths only those of the
service, since anything else is a client's text. FORECART_ACCESS_LOG=1 switches it on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

from serving.middleware import App, Message, Receive, Send

ACCESS_VARIABLE: Final = "FORECART_ACCESS_LOG"
ROUTES: Final = frozenset({"/predict", "/explain", "/events", "/users/predict", "/users/erase"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What answers a probe every few seconds is no news.
_SILENT: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})


class LogAccess:
    """Writes a line for every request.

    Args:
        app: the application inside.
        write: takes a line; None = standard output, where FORECART_ACCESS_LOG is 1.
    """

    def __init__(self, app: App, write: Callable[[str], object] | None = None) -> None:
        self.app = app
        if write is None and os.environ.get(ACCESS_VARIABLE) == "1":
            write = _write
        self._write = write

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if self._write is None or scope["type"] != "http" or scope["path"] in _SILENT:
            await self.app(scope, receive, send)
            return
        # A client that hangs up gets no answer; 499 is what proxies write for it.
        status, size = 499, 0
        began = time.perf_counter()

        async def count(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, count)
        finally:
            line = {
                "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "method": scope["method"] if scope["method"] in _METHODS else "other",
                "route": scope["path"] if scope["path"] in ROUTES else "other",
                "status": status,
                "bytes": size,
                "ms": round((time.perf_counter() - began) * 1000, 1),
            }
            self._write(json.dumps(line))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
