"""Ends connections whose client does not go on, for which uvicorn would wait without end."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Until the head of a request is there, and until the client has read enough of its answers that
# more can be written.
HEAD_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0


class Connection(HttpToolsProtocol):
    """A connection of HTTP that a client cannot keep open by doing nothing."""

    _head: asyncio.TimerHandle | None = None
    _read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        for timer in (self._head, self._read):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Wait for the head of a request that has begun."""
        super().on_message_begin()
        if self._head is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Take a head."""
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._read = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Write on."""
        if self._read is not None:
            self._read.cancel()
            self._read = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, also where the client has not read the last answer."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(HEAD_SECONDS, self._miss_head)

    def _miss_head(self) -> None:
        # While an earlier request of the client is worked on, nothing is read of the next one.
        if self.flow.read_paused:
            self._expect_head()
        else:
            self.transport.abort()


def install() -> None:
    """Have uvicorn, which BentoML starts, use this for its connections."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"
