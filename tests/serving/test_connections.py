"""A client that sends or reads nothing does not keep its connection."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

import serving.service  # noqa: F401 - has uvicorn use these connections, as in the service
from serving import connections

pytestmark = pytest.mark.integration

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


def read_answer(client: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    answer = b""
    while part := client.recv(1 << 16):
        answer += part
    return answer


def send_on(client: socket.socket, part: bytes, *, until: float = 5.0) -> bool:
    """Send something again and again; return whether the connection ends."""
    end = time.monotonic() + until
    try:
        while time.monotonic() < end:
            client.sendall(part)
            time.sleep(0.05)
    except OSError:
        return True
    return False


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * (100 << 10) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * (100 << 10) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * (8 << 20),
        b"GET / HTTP/1.1\r\n" + 200 * b"x:y\r\n" + b"\r\n",
        b"GET / HTTP/1.1\r\n" + (2 << 20) * b"x:y\r\n",
        b"\r\n" * (1 << 20),
    ],
    ids=["address", "header", "endless header", "headers", "endless headers", "nothing"],
)
def test_a_head_is_not_read_without_end(port: int, head: bytes) -> None:
    with connect(port) as client:
        try:
            client.sendall(head)
        except OSError:
            return
        answer = read_answer(client)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"head_too_large"' in answer


def test_trailers_are_not_read_without_end(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    with connect(port) as client:
        client.sendall(head)
        assert send_on(client, 1000 * b"x:y\r\n")


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"GET / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (REQUEST, b"\r\n"),
    ],
    ids=["body", "chunks", "idle"],
)
@pytest.mark.parametrize("once", [True, False])
def test_who_sends_on_behind_the_answer_is_let_go(
    port: int, sent: bytes, more: bytes, *, once: bool
) -> None:
    with connect(port) as client:
        client.sendall(sent)
        got = b""
        while len(got) < len(ANSWER):
            got += client.recv(1 << 16)
        if not once:
            assert send_on(client, more)
            return
        client.sendall(more)
        client.settimeout(4)  # uvicorn's own timer, which the byte ends, is 5 s
        read_all(client)


def test_more_connections_than_can_be_had_are_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 10.0)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with connect(port) as first, connect(port), connect(port):
        first.sendall(REQUEST)
        assert first.recv(12) == b"HTTP/1.1 200"
        with connect(port) as fourth:
            fourth.sendall(REQUEST)
            assert read_answer(fourth).startswith(b"HTTP/1.1 503 ")


def test_descriptors_are_left_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def allow(count: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (count, count))

    for allowed, most in ((1 << 20, 4096), (1024, 704), (256, 128)):
        allow(allowed)
        assert connections.find_most() == most


def test_who_reads_gets_every_answer(port: int) -> None:
    with connect(port) as client:
        client.sendall(2 * REQUEST)
        time.sleep(0.1)
        got = 0
        while got < 2 * len(ANSWER):
            part = client.recv(1 << 16)
            assert part
            got += len(part)
