"""A client that sends or reads nothing does not keep its connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

import serving.service  # noqa: F401 - has uvicorn use these connections, as in the service
from serving import connections

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
ANSWER = bytes(1 << 20)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    server = uvicorn.Server(uvicorn.Config(answer, lifespan="off", log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join(10)


def connect(port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(10)
        try:
            client.connect(("127.0.0.1", port))
            return client
        except OSError:
            client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def read_all(client: socket.socket) -> int:
    """Return how much comes until the connection ends."""
    count = 0
    try:
        while part := client.recv(1 << 16):
            count += len(part)
    except ConnectionResetError:
        pass
    return count


@pytest.mark.parametrize("sent", [b"", REQUEST[:-2]])
def test_who_sends_no_whole_head_is_let_go(port: int, sent: bytes) -> None:
    with connect(port) as client:
        client.sendall(sent)
        assert read_all(client) == 0


def test_who_does_not_read_is_let_go(port: int) -> None:
    with connect(port) as client:
        client.sendall(16 * REQUEST)
        time.sleep(1.0)
        assert read_all(client) < 16 * len(ANSWER)


def test_who_reads_gets_every_answer(port: int) -> None:
    with connect(port) as client:
        client.sendall(2 * REQUEST)
        time.sleep(0.1)
        got = 0
        while got < 2 * len(ANSWER):
            part = client.recv(1 << 16)
            assert part
            got += len(part)
