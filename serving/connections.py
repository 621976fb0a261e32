"""Ends connections whose client does not go on, or sends without end what uvicorn would keep."""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus
from typing import Final

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.middleware import JSON, describe_refusal

# Until the head of a request is there, and until the client has read enough of its answers that
# more can be written.
HEAD_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0
# For a client to read why its connection is closed.
LEAVE_SECONDS: Final = 1.0

# Of a request without its body: address and headers, and trailers and what else is between the
# parts of the body.
MAX_HEAD_BYTES: Final = 1 << 16
MAX_HEADERS: Final = 128

# Connections at once; and where the system allows few descriptors, so many are left for files and
# the store. Of those that are refused some are told so.
MAX_CONNECTIONS: Final = 4096
_OTHER_DESCRIPTORS: Final = 256
_MAX_REFUSED: Final = 64


class HeadTooLarge(Exception):
    """A request has too much around its body."""


class Connection(HttpToolsProtocol):
    """A connection of HTTP that a client cannot keep open by doing nothing."""

    _head: asyncio.TimerHandle | None = None
    _read: asyncio.TimerHandle | None = None
    # Whether the client was told that the connection ends.
    _is_left = False
    # Bytes since a head or a part of a body was there, and of the head that is being read.
    _unused = 0
    _head_bytes = 0
    _is_too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        over = len(self.connections) - find_most()
        if over > _MAX_REFUSED:
            transport.abort()
        elif over > 0:
            self._leave(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        for timer in (self._head, self._read):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what is no whole request is not waited for longer because more of it comes."""
        if self._is_left:
            return
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        self._unused += len(data)
        super().data_received(data)
        if self._unused > MAX_HEAD_BYTES and not self._is_left:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Wait for the head of a request that has begun."""
        super().on_message_begin()
        self._head_bytes = 0
        if self._head is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Take a part of the address."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._count_head(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._fail_head()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Take a head."""
        self._unused = 0
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._unused = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or too much of it."""
        if self._is_too_large:
            self._refuse_head()
        else:
            self._leave(HTTPStatus.BAD_REQUEST, msg)

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

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail_head()

    def _fail_head(self) -> None:
        self._is_too_large = True
        raise HeadTooLarge

    def _refuse_head(self) -> None:
        text = f"send at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes of them"
        self._leave(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def _leave(self, status: HTTPStatus, text: str) -> None:
        """Tell the client why its connection ends.

        To close it at once would drop the answer, where more has come than was read.
        """
        self._is_left = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # Of what is being worked on nothing can be told behind this.
            if cycle.response_started or self.pipeline:
                self.transport.abort()
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.is_closing():
            return
        body = describe_refusal(status, text)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {JSON}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LEAVE_SECONDS, self.transport.abort)


def find_most() -> int:
    """Return how many connections are open at once at most."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(allowed - _OTHER_DESCRIPTORS - _MAX_REFUSED, allowed // 2))


def install() -> None:
    """Have uvicorn, which BentoML starts, use this for its connections."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"
