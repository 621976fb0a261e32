"""A real nginx with the gateway's configuration before a small stand-in for the service."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest

from serving.middleware import CODES
from tests.integration.test_gateway import KEY, Gateway, find_port, run_nginx

KEYED = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\n"
Answer = tuple[int, dict[str, str], bytes]


class Upstream(ThreadingHTTPServer):
    """Answers everything, or drops what it was sent, and remembers what arrived."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str] = []
        # Which request of a connection, counted from one, is dropped unanswered.
        self.drop = 0


class Handler(BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    protocol_version = "HTTP/1.1"
    # Head and body leave together.
    wbufsize = 1 << 16
    server: Upstream

    def setup(self) -> None:
        """Count the requests of this connection."""
        super().setup()
        self.count = 0

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.count += 1
        self.server.seen.append(f"{self.command} {self.path}")
        if self.count == self.server.drop:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with Upstream() as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def upstream(server: Upstream) -> Upstream:
    server.seen.clear()
    server.drop = 0
    return server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, server: Upstream) -> Iterator[Gateway]:
    with run_nginx(tmp_path_factory.mktemp("gateway"), server.server_address[1]) as found:
        yield found


@pytest.fixture
def fresh(tmp_path: Path, upstream: Upstream) -> Iterator[Gateway]:
    """Run another one, whose limits nobody has used up and whose connections are new."""
    with run_nginx(tmp_path, upstream.server_address[1]) as found:
        yield found


def send(gateway: Gateway, request: bytes, *, tls: bool = True, source: str = "127.0.0.1") -> bytes:
    """Send these bytes in one connection and return all that comes back until it is closed."""
    address = ("127.0.0.1", gateway.port)
    with socket.create_connection(address, timeout=60, source_address=(source, 0)) as plain:
        connection = plain
        if tls:
            trust = ssl.create_default_context(cafile=str(gateway.folder / "tls.crt"))
            connection = trust.wrap_socket(plain, server_hostname="localhost")
        connection.sendall(request)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
    return found


def read(answer: bytes) -> Answer:
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = [line.split(": ", 1) for line in lines]
    assert len({name.lower() for name, _ in headers}) == len(headers), headers
    return int(first.split()[1]), {name.lower(): value for name, value in headers}, content


def check(answer: Answer, status: int, *, tls: bool = True) -> None:
    """Check that this is an error in the service's form, with the headers of every answer."""
    found, headers, content = answer
    assert found == status, content
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    # Over plain HTTP the header may not be sent (RFC 6797, section 7.2).
    assert ("strict-transport-security" in headers) == tls
    body = json.loads(content)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "field"}
    assert body["error"]["code"] == CODES.get(status, f"http_{status}")
    assert body["error"]["message"]
    assert body["error"]["field"] is None


def flood(gateway: Gateway, key: str, count: int = 900) -> Counter[int]:
    one = f"GET /readyz HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    last = one + "Connection: close\r\n\r\n"
    found = send(gateway, (f"{one}\r\n" * (count - 1) + last).encode())
    return Counter(map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", found)))


def test_those_who_guess_keys_are_held_by_their_address(fresh: Gateway, upstream: Upstream) -> None:
    counts = flood(fresh, "wrong") + flood(fresh, "wrong") + flood(fresh, "wrong")
    assert set(counts) == {401, 429}, counts
    assert counts.total() == 2700
    assert counts[429] > 1000, counts
    assert not upstream.seen
    # Who asks with a key from elsewhere is not held up by them.
    request = f"GET /readyz HTTP/1.1\r\n{KEYED}Connection: close\r\n\r\n".encode()
    assert read(send(fresh, request, source="127.0.0.2"))[0] == 200


def test_a_key_is_held_to_its_own_limit(fresh: Gateway, upstream: Upstream) -> None:
    counts = flood(fresh, KEY, 300)
    assert set(counts) == {200, 429}, counts
    # A burst of 100, and 50 for each second that this took.
    assert 100 <= counts[200] < 290
    assert len(upstream.seen) == counts[200]


def test_refusals_have_the_services_form(fresh: Gateway, upstream: Upstream) -> None:
    unknown = fresh.ask("POST", "/predict", b"{}", key="wrong")
    check(unknown, 401)
    assert unknown[1]["www-authenticate"] == "Bearer"
    # What asks for the key is not for the outside.
    for path in ("/metrics", "/.key", "/.refusal"):
        check(fresh.ask("GET", path), 404)
    check(fresh.ask("POST", "/predict", b"{" + b" " * (8 << 20)), 413)
    assert not upstream.seen
    upstream.drop = 1
    check(fresh.ask("POST", "/predict", b"{}"), 503)


def test_a_flood_is_told_when_to_come_again(fresh: Gateway) -> None:
    one = f"GET /readyz HTTP/1.1\r\n{KEYED}"
    found = send(fresh, (f"{one}\r\n" * 300 + f"{one}Connection: close\r\n\r\n").encode())
    begin = found.index(b"HTTP/1.1 429 ")
    end = found.find(b"HTTP/1.1 ", begin + 1)
    busy = read(found[begin : end if end > 0 else None])
    check(busy, 429)
    assert busy[1]["retry-after"] == "1"


# More than a header buffer of nginx (8 KiB), less than a TLS record (16 KiB): nginx refuses and
# closes once it has read the first record, so that sending another could fail.
TOO_LONG: Final = 10_000


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /" + "a" * TOO_LONG + " HTTP/1.1", KEYED, 414),
        ("TRACE / HTTP/1.1", KEYED, 405),
        ("CONNECT localhost:443 HTTP/1.1", KEYED, (400, 405)),
        ("GET /users/%00/prediction HTTP/1.1", KEYED, 400),
        ("GET /../x HTTP/1.1", KEYED, 400),
        ("GET /readyz HTTP/1.1", KEYED + f"X-Large: {'a' * TOO_LONG}\r\n", 400),
        ("GET /readyz HTTP/1.1", "", 400),
        ("no request", "", 400),
        ("GET /readyz HTTP/7.0", KEYED, 505),
        ("POST /predict HTTP/1.1", KEYED + "Transfer-Encoding: gzip\r\n", 501),
    ],
    ids=lambda value: str(value)[:24].replace("\r\n", " "),
)
def test_what_nginx_cannot_read_is_refused_in_the_services_form(
    gateway: Gateway,
    upstream: Upstream,
    request_line: str,
    headers: str,
    status: int | tuple[int, ...],
) -> None:
    request = f"{request_line}\r\n{headers}Connection: close\r\n\r\n"
    answer = read(send(gateway, request.encode()))
    allowed = (status,) if isinstance(status, int) else status
    assert answer[0] in allowed, answer
    check(answer, answer[0])
    assert not upstream.seen


def test_plain_http_is_refused_in_the_services_form(gateway: Gateway) -> None:
    request = f"GET /readyz HTTP/1.1\r\n{KEYED}Connection: close\r\n\r\n".encode()
    check(read(send(gateway, request, tls=False)), 400, tls=False)


def test_every_good_answer_has_the_headers(gateway: Gateway) -> None:
    for path in ("/readyz", "/livez"):
        status, headers, _ = gateway.ask("GET", path)
        assert status == 200
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["strict-transport-security"] == "max-age=31536000"


def test_the_log_tells_method_and_route_of_what_was_refused(gateway: Gateway) -> None:
    gateway.ask("POST", "/predict", b"{}", key="wrong")
    for _ in range(50):
        if "  POST /predict 401 " in (gateway.folder / "access.log").read_text():
            return
        time.sleep(0.1)
    pytest.fail((gateway.folder / "access.log").read_text())


@pytest.mark.parametrize(
    ("method", "status", "arrived"), [("POST", 503, 1), ("PUT", 200, 2), ("GET", 200, 2)]
)
def test_a_post_that_was_sent_is_never_repeated(
    fresh: Gateway, upstream: Upstream, method: str, status: int, arrived: int
) -> None:
    # The service closes a kept connection when the second request has arrived in it.
    upstream.drop = 2
    body = b"" if method == "GET" else b"{}"
    one = f"GET /first HTTP/1.1\r\n{KEYED}\r\n"
    two = f"{method} /second HTTP/1.1\r\n{KEYED}Content-Length: {len(body)}\r\n"
    # Both in one connection, so that the same worker of nginx has them.
    found = send(fresh, (one + two + "Connection: close\r\n\r\n").encode() + body)
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)] == [200, status]
    assert upstream.seen == ["GET /first", *[f"{method} /second"] * arrived]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_one_server_is_asked_once_in_a_new_connection(
    fresh: Gateway, upstream: Upstream, method: str
) -> None:
    upstream.drop = 1
    check(fresh.ask(method, "/second", b"{}" if method == "POST" else None), 503)
    assert upstream.seen == [f"{method} /second"]


def test_a_service_that_is_away_is_told(tmp_path: Path) -> None:
    with run_nginx(tmp_path, find_port()) as gateway:
        check(gateway.ask("POST", "/predict", b"{}"), 503)


def test_no_log_names_a_shopper(tmp_path: Path) -> None:
    """Of what it refuses, and of a service that is away, nginx would tell the whole address."""
    with run_nginx(tmp_path, find_port()) as gateway:
        check(gateway.ask("GET", "/users/susan/prediction?now=2025"), 503)
        one = f"GET /users/susan/prediction?now=2025 HTTP/1.1\r\n{KEYED}"
        found = send(gateway, (f"{one}\r\n" * 300 + f"{one}Connection: close\r\n\r\n").encode())
        assert b"HTTP/1.1 429 " in found
        check(gateway.ask("POST", "/users/susan", b"{" + b" " * (8 << 20)), 413)
    logs = {name: (tmp_path / name).read_text() for name in ("access.log", "error.log")}
    assert " GET /users/ 429 " in logs["access.log"]
    # Which of the service's failures it was: the client is told 503 of all.
    assert re.search(r" GET /users/ 503 \d+ \S+ 502 ", logs["access.log"])
    for name, text in logs.items():
        assert "susan" not in text, (name, text[-500:])
        assert "now=2025" not in text, name
