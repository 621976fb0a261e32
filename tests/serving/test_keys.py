"""API keys: who is let in, and how often."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from serving.keys import HOSTS_VARIABLE, KEYS_VARIABLE, RequireKey, read_clients, read_hosts


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def answer(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(
    app: RequireKey, headers: dict[str, str], path: str = "/predict", *, server: str | None = None
) -> tuple[int, dict[str, str], Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    scope: dict[str, Any] = {"type": "http", "path": path, "headers": raw}
    scope["server"] = server and (server, 3000)
    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, json.loads(sent[1]["body"])


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\nshop {digest('s3cret')} 2\n\nother {digest('else')}\n")
    monkeypatch.setenv(KEYS_VARIABLE, str(path))
    return path


def test_without_a_file_everybody_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert ask(RequireKey(answer), {})[0] == 200


@pytest.mark.parametrize("server", ["127.0.0.1", "::1", "10.0.0.7", "172.17.0.2"])
@pytest.mark.parametrize(
    ("host", "path", "status"),
    [
        ("127.0.0.1:3000", "/users/erase", 200),
        ("localhost", "/users/erase", 200),
        ("LOCALHOST:3000", "/users/erase", 200),
        ("[::1]:3000", "/users/erase", 200),
        ("10.0.0.7:3000", "/users/erase", 200),
        ("[fd00::7]", "/users/erase", 200),
        ("forecart.shop", "/users/erase", 200),
        ("Service:3000", "/users/erase", 200),
        # What a site in a browser can have point here.
        ("evil.example:3000", "/users/erase", 400),
        ("localhost.evil.example", "/users/erase", 400),
        ("127.0.0.1.evil.example", "/users/erase", 400),
        ("127.0.0.1@evil.example", "/users/erase", 400),
        ("other.forecart.shop", "/users/erase", 400),
        ("", "/users/erase", 400),
        # Probes.
        ("evil.example", "/readyz", 200),
    ],
)
def test_without_keys_names_that_are_not_known_are_refused(
    host: str, path: str, status: int, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the server's own address is none of loopback, whoever can reach it."""
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setenv(HOSTS_VARIABLE, "forecart.shop, service,")
    assert ask(RequireKey(answer), {"Host": host}, path, server=server)[0] == status


def test_a_refused_name_is_told_how_to_be_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.delenv(HOSTS_VARIABLE, raising=False)
    _, _, body = ask(RequireKey(answer), {"Host": "forecart"}, server="10.0.0.7")
    assert "FORECART_HOSTS" in body["error"]["message"]


@pytest.mark.parametrize("hosts", ["http://shop", "shop:3000", "*", "shop/x", "-"])
def test_what_is_no_name_of_a_host_is_told(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, f"good,{hosts}")
    with pytest.raises(UserError, match="FORECART_HOSTS"):
        read_hosts()


def test_a_key_counts_whatever_the_host(keys: Path) -> None:
    headers = {"Host": "forecart.shop", "X-API-Key": "s3cret"}
    assert ask(RequireKey(answer), headers, server="127.0.0.1")[0] == 200


def test_a_file_of_other_letters_is_told(keys: Path) -> None:
    keys.write_bytes("shöp".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_clients()


def test_a_key_lets_in_and_nothing_else_does(keys: Path) -> None:
    app = RequireKey(answer)
    assert ask(app, {"X-API-Key": "s3cret"})[0] == 200
    assert ask(app, {"Authorization": "Bearer else"})[0] == 200
    for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": digest("s3cret")}):
        status, _, body = ask(app, headers)
        assert status == 401
        assert body["error"]["code"] == "unauthorized"
    assert ask(app, {}, "/readyz")[0] == 200


def test_the_rate_is_kept_and_recovers(keys: Path) -> None:
    clock = Clock()
    app = RequireKey(answer, clock)
    header = {"X-API-Key": "s3cret"}
    assert [ask(app, header)[0] for _ in range(5)] == [200, 200, 200, 200, 429]
    status, found, body = ask(app, header)
    assert (status, found["retry-after"]) == (429, "1")
    assert body["error"]["code"] == "too_many_requests"
    assert ask(app, {"X-API-Key": "else"})[0] == 200
    clock.now += 0.5
    assert [ask(app, header)[0] for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    "line", ["shop", "shop abc 1", f"shop {'g' * 64}", f"shop {digest('x')} fast", "", "# none"]
)
def test_a_line_that_is_none_is_told(keys: Path, line: str) -> None:
    keys.write_text(line)
    with pytest.raises(UserError, match="keys"):
        read_clients()


def test_a_key_that_is_withdrawn_is_refused_without_a_restart(keys: Path) -> None:
    clock = Clock()
    app = RequireKey(answer, clock)
    assert ask(app, {"X-API-Key": "s3cret"})[0] == 200
    # As editors, and Kubernetes for a Secret, put a new file in place.
    new = keys.with_name("new")
    new.write_text(f"shop {digest('rotated')} 2\nother {digest('else')}\n")
    new.replace(keys)
    clock.now += 60
    assert ask(app, {"X-API-Key": "s3cret"})[0] == 401
    assert ask(app, {"X-API-Key": "rotated"})[0] == 200
    assert ask(app, {"X-API-Key": "else"})[0] == 200


def test_nobody_gets_in_once_the_last_key_is_withdrawn(keys: Path) -> None:
    clock = Clock()
    app = RequireKey(answer, clock)
    keys.write_text("# withdrawn\n")
    clock.now += 60
    assert ask(app, {"X-API-Key": "s3cret"})[0] == 401
    assert ask(app, {})[0] == 401


@pytest.mark.parametrize("content", [None, "shop abc 1\n"])
def test_a_file_of_keys_that_is_none_changes_nothing_and_is_told_once(
    keys: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    app = RequireKey(answer, clock)
    before = keys.read_text()
    if content is None:
        keys.unlink()
    else:
        keys.write_text(content)
    for _ in range(3):
        clock.now += 60
        assert ask(app, {"X-API-Key": "s3cret"})[0] == 200
        assert ask(app, {"X-API-Key": "wrong"})[0] == 401
    assert caplog.text.count("the keys before go on to count") == 1
    keys.write_text(before.replace(digest("s3cret"), digest("rotated")))
    clock.now += 60
    assert ask(app, {"X-API-Key": "rotated"})[0] == 200
