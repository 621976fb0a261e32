from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serving.access import CALLS, PARTS, USER, ObserveRequests, name_route
from serving.service import Forecart


def ask(path: str, *, method: str = "POST", status: int | None = 200) -> list[dict[str, Any]]:
    """Send one request through the log; return its lines. Without a status nothing is answered."""
    lines: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"12345"})

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": method, "path": path, "query_string": b"user=anna"}
    asyncio.run(ObserveRequests(app, lines.append)(scope, send, send))  # type: ignore[arg-type]
    return [json.loads(line) for line in lines]


def test_a_request_is_one_line() -> None:
    (line,) = ask("/predict", status=429)
    assert line.pop("ts").endswith("+00:00")
    assert line.pop("ms") >= 0
    assert line == {"method": "POST", "route": "/predict", "status": 429, "bytes": 5}


def test_a_client_that_hung_up_is_told() -> None:
    assert ask("/predict", status=None)[0]["status"] == 499


def test_what_clients_write_is_left_out() -> None:
    assert "anna" not in json.dumps(ask("/users/anna", method="ANNA"))


def test_probes_are_no_news() -> None:
    assert ask("/readyz") == []


def test_it_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/predict"}
    for value, lines in (("", 0), ("1", 1)):
        monkeypatch.setenv("FORECART_ACCESS_LOG", value)
        asyncio.run(ObserveRequests(app)(scope, send, send))  # type: ignore[arg-type]
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_all_routes_of_the_service_are_known() -> None:
    service: Any = Forecart
    assert {method.route for method in service.apis.values()} == CALLS
    ((app, _, _),) = service.mount_apps
    users = {f"{USER}/{part}" for part in PARTS} | {USER}
    assert {r.path_format for r in app.routes} == users | {"/metrics"}


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/users/anna/prediction", "/users/{user_id}/prediction"),
        ("GET", "/users/a/b/next-items", "/users/{user_id}/next-items"),
        ("DELETE", "/users/anna/prediction", "/users/{user_id}"),
        ("PUT", "/users/anna", "/users/{user_id}"),
        ("POST", "/users/erase", "/users/erase"),
        ("GET", "/anna", "other"),
    ],
)
def test_an_id_in_a_path_is_not_told(method: str, path: str, route: str) -> None:
    assert name_route(method, path) == route


def test_every_request_is_counted() -> None:
    seen: list[tuple[str, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})

    async def send(message: Any) -> None:
        pass

    def count(route: str, status: int, seconds: float) -> None:
        seen.append((route, status))

    scope = {"type": "http", "method": "GET", "path": "/users/anna/prediction"}
    observed = ObserveRequests(app, count=count)
    asyncio.run(observed(scope, send, send))  # type: ignore[arg-type]
    assert seen == [("/users/{user_id}/prediction", 404)]
