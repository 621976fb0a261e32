"""Events from a REST API: a real server on loopback, that answers as shops do."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from pipelines import config
from pipelines.config import Rest
from pipelines.errors import UserError
from pipelines.sources import web
from pipelines.sources.base import Kind
from pipelines.sources.rest import RestSource
from pipelines.sources.web import HEADER_VARIABLE
from pipelines.stages import fingerprint, ingest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-hunter2"  # noqa: S105 - nobody's
Reply = tuple[int, dict[str, str], bytes]


def reply(data: Any, status: int = 200, **headers: str) -> Reply:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


class Shop:
    """A server whose answers a test gives, and which remembers what it was asked.

    Attributes:
        answer: path and query -> answer; None closes the connection without one.
        asked: (path with query, headers) of each request.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, str]], Any] = lambda path, query: reply([])
        self.asked: list[tuple[str, dict[str, str]]] = []
        shop = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                shop.asked.append((self.path, dict(self.headers)))
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                found = shop.answer(parts.path, query)
                if callable(found):
                    found(self)
                    return
                status, headers, body = found
                self.close_connection = "Content-Length" in headers
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def handle(self) -> None:
                with suppress(ConnectionError):  # of clients that have enough
                    super().handle()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEADER_VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def shop() -> Iterator[Shop]:
    server = Shop()
    yield server
    server.close()


def event(number: int, **more: Any) -> dict[str, Any]:
    ts = f"2025-03-01T00:00:{number:02d}Z"
    return {"user_id": f"u{number}", "ts": ts, "event_type": "view", **more}


def open_source(shop: Shop, *, patience: float = 5.0, **options: Any) -> RestSource:
    params = Rest.model_validate({"url": f"{shop.url}/events", **options})
    return RestSource(params, pause=0.001, patience=patience)


def read(source: RestSource, kind: Kind = Kind.EVENTS) -> list[dict[str, Any]]:
    return [row for batch in source.read(kind) for row in batch.table.to_pylist()]


def users(source: RestSource) -> list[str]:
    """Read events of whom, and see that the fingerprint describes what is read."""
    found = source.fingerprint()
    rows = read(source)
    assert source.fingerprint_read() == {key: found[key] for key in ("source", "events")}
    return [row["user_id"] for row in rows]


def refuse(source: RestSource) -> str:
    with pytest.raises(UserError) as caught:
        source.fingerprint()
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    with pytest.raises(UserError) as caught:
        read(source)
    assert str(caught.value) == told
    return told


# -- pages -----------------------------------------------------------------------------------


def serve_linked(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    page = int(query.get("page", 1))
    link = f'<{shop.url}/events?page=1>; rel="first", <{path}?page={page + 1}>; rel="next"'
    more = {"Link": link} if page < 3 else {}
    # A page may be empty, and the next one not.
    return reply([] if page == 2 else [event(page)], **more)


def serve_addressed(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    page = int(query.get("page", 1))
    following = f"{shop.url}{path}?page={page + 1}" if page < 3 else None
    return reply({"links": {"next": following}, "data": [event(page)]})


def serve_cursors(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    assert query["per_page"] == "1"
    page = {"": 1, "b=": 2, "c&": 3}[query.get("after", "")]
    return reply({"data": [event(page)], "meta": {"next": {1: "b=", 2: "c&", 3: ""}[page]}})


def serve_last_ids(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    page = int(query.get("after", 0)) + 1
    return reply({"data": [event(page, id=page)] if page <= 3 else []})


def serve_pages(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    page = int(query["page"])
    return reply({"detail": "Invalid page."}, 404) if page > 3 else reply([event(page)])


def serve_offsets(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    # Fewer than are asked for.
    start = int(query["offset"])
    return reply({"total": 3, "rows": [event(i) for i in (1, 2, 3)][start : start + 2]})


CURSOR = {"by": "cursor", "path": "meta.next", "parameter": "after"}


@pytest.mark.parametrize(
    ("serve", "options", "found", "requests"),
    [
        (serve_linked, {"pages": {"by": "link"}}, [1, 3], 3),
        (serve_addressed, {"pages": {"by": "url", "path": "links.next"}}, [1, 2, 3], 3),
        (serve_cursors, {"pages": CURSOR, "query": {"per_page": 1}}, [1, 2, 3], 3),
        (serve_last_ids, {"pages": CURSOR | {"path": "data.-1.id"}}, [1, 2, 3], 4),
        (serve_pages, {"pages": {"by": "page", "parameter": "page"}}, [1, 2, 3], 4),
        (
            serve_offsets,
            {"pages": {"by": "offset", "parameter": "offset"}, "query": {"limit": 10}},
            [1, 2, 3],
            3,
        ),
    ],
)
def test_every_page_is_read(
    shop: Shop,
    serve: Callable[..., Reply],
    options: dict[str, Any],
    found: list[int],
    requests: int,
) -> None:
    shop.answer = lambda path, query: serve(shop, path, query)
    source = open_source(shop, **options)
    assert users(source) == [f"u{i}" for i in found]
    assert len(shop.asked) == 2 * requests
    assert source.tell_omissions() == ""


@pytest.mark.parametrize(
    ("serve", "options", "told"),
    [
        (
            lambda path, query: reply([event(1)], Link="</events?page=2>; rel=next"),
            {},
            "/events has a next page, which is not read: ingest.rest.pages: {by: link} reads it",
        ),
        (
            lambda path, query: reply([event(1)]),
            {"pages": {"by": "link"}},
            "/events answers without a header Link to a next page: one page is read",
        ),
        (
            lambda path, query: reply({"data": [event(1)], "next": "x"}),
            {"pages": CURSOR},
            "/events answers without meta.next (ingest.rest.pages.path): one page is read",
        ),
    ],
)
def test_pages_that_seem_to_be_left_out_are_told(
    shop: Shop, serve: Any, options: dict[str, Any], told: str
) -> None:
    shop.answer = serve
    source = open_source(shop, **options)
    assert users(source) == ["u1"]
    assert source.tell_omissions() == f"; {shop.url}{told}"


@pytest.mark.parametrize(
    ("pages", "told"),
    [
        (CURSOR, "the next page is one that was read already, {url}/events?after=x (ingest"),
        ({"by": "url", "path": "meta.next"}, "that was read already, {url}/x (ingest.rest.pages)"),
        ({"by": "page", "parameter": "p"}, "is p (ingest.rest.pages.parameter) right?"),
        ({"by": "offset", "parameter": "o"}, "events?o=1: the page is the one before again"),
        (CURSOR | {"path": "meta"}, "what is at meta leads to no page (ingest.rest.pages.path)"),
    ],
)
def test_pages_without_end_are_refused(shop: Shop, pages: dict[str, str], told: str) -> None:
    shop.answer = lambda path, query: reply({"data": [event(1)], "meta": {"next": "x"}})
    assert told.format(url=shop.url) in refuse(open_source(shop, pages=pages))
    assert len(shop.asked) <= 6


@pytest.mark.parametrize("refuses", [False, True])
def test_numbers_past_the_last_page_that_bring_no_empty_one_are_told(
    shop: Shop, refuses: bool
) -> None:
    """Where the server says neither is not known: it may be all, or as many as it numbers."""

    def serve(path: str, query: dict[str, str]) -> Reply:
        page = int(query["page"])
        return reply({}, 400) if refuses and page > 3 else reply([event(min(page, 3))])

    shop.answer = serve
    line = refuse(open_source(shop, pages={"by": "page", "parameter": "page"}))
    told = (
        "answers 400 Bad Request"
        if refuses
        else "the page is the one before again; ingest.rest.pages: {by: cursor, ...} finds the end"
    )
    assert line == f"{shop.url}/events?page=4: {told}"


def serve_as_magento(shop: Shop, path: str, query: dict[str, str]) -> Reply:
    chosen = "searchCriteria[filter_groups][0][filters][0]"
    assert (query[f"{chosen}[field]"], query[f"{chosen}[condition_type]"]) == ("id", "gt")
    above = int(query[f"{chosen}[value]"])
    return reply({"items": [event(i, id=i) for i in (1, 2, 3) if i > above][:2], "total_count": 3})


def test_a_cursor_takes_the_place_of_a_filter(shop: Shop) -> None:
    shop.answer = lambda path, query: serve_as_magento(shop, path, query)
    chosen = "searchCriteria[filter_groups][0][filters][0]"
    source = open_source(
        shop,
        query={f"{chosen}[field]": "id", f"{chosen}[condition_type]": "gt", f"{chosen}[value]": 0},
        pages={"by": "cursor", "path": "items.-1.id", "parameter": f"{chosen}[value]"},
    )
    assert users(source) == ["u1", "u2", "u3"]


def test_users_and_items_have_endpoints_of_their_own(shop: Shop) -> None:
    def serve(path: str, query: dict[str, str]) -> Reply:
        if path == "/customers":
            assert query == {"state": "enabled"}
            return reply({"customers": [{"id": 7, "address": {"zip": "04103"}}], "tags": []})
        if path == "/products":
            return reply([{"item_id": "i1", "category": "hats"}])
        return reply([event(int(query["page"]))] if query["page"] == "1" else [])

    shop.answer = serve
    customers = {
        "url": f"{shop.url}/customers",
        "records": "customers",
        "query": {"state": "enabled"},
        "pages": {},
    }
    products = {"url": f"{shop.url}/products"}
    options: dict[str, Any] = {
        "pages": {"by": "page", "parameter": "page"},
        "users": customers,
        "users_mapping": {"user_id": "id", "region": "address.zip"},
    }
    source = open_source(shop, items=products | {"pages": {}}, **options)
    found = source.fingerprint()
    assert [row["user_id"] for row in read(source)] == ["u1"]
    (row,) = read(source, Kind.USERS)
    assert (row["user_id"], row["region"]) == ("7", "04103")
    assert [row["item_id"] for row in read(source, Kind.ITEMS)] == ["i1"]
    assert source.fingerprint_read() == found
    assert found["users"]["url"] == f"{shop.url}/customers"
    # By itself it has the pages of the events.
    told = "the page is the one before again; is page (ingest.rest.items.pages.parameter) right?"
    with pytest.raises(UserError, match=re.escape(told)):
        read(open_source(shop, items=products["url"], **options), Kind.ITEMS)


# -- records ---------------------------------------------------------------------------------

ORDERS = {
    "orders": [
        {
            "id": 9007199254740993,
            "created": "2025-03-01 10:00",
            "customer": {"id": 9007199254740995},
            "state": "paid",
            "lines": [
                {"sku": "ä1", "price": {"amount": 12.50}, "qty": 2},
                {"sku": "b", "price": {"amount": "3"}, "qty": 1},
            ],
        },
        {"id": 2, "created": "2025-03-02 10:00", "customer": {"id": "ann"}, "lines": []},
        {
            "id": 3,
            "created": "2025-03-02 10:00",
            "customer": None,
            "state": "paid",
            "lines": [{"sku": "b"}],
        },
        {
            "id": 4,
            "created": "2025-03-03 10:00",
            "customer": {"id": "bob"},
            "state": "draft",
            "lines": {"sku": "c", "qty": True},
        },
    ]
}
ORDER_LINES = {
    "each": "lines",
    "mapping": {
        "user_id": "customer.id",
        "ts": {"column": "created", "timezone": "Europe/Berlin"},
        "event_type": {"column": "state", "values": {"paid": "purchase", "draft": None}},
        "item_id": "lines.sku",
        "price": "lines.price.amount",
        "quantity": "lines.qty",
        "session_id": "id",
    },
}


def test_an_order_gives_a_row_for_each_of_its_items(shop: Shop) -> None:
    shop.answer = lambda path, query: reply(ORDERS)
    (batch,) = open_source(shop, **ORDER_LINES).read(Kind.EVENTS)
    assert (batch.rows, batch.anonymous, batch.ignored) == (4, 1, 1)
    rows = batch.table.to_pylist()
    # A double would make another shopper of it.
    assert {row["user_id"] for row in rows} == {"9007199254740995"}
    assert {row["session_id"] for row in rows} == {"9007199254740993"}
    assert {row["ts"] for row in rows} == {datetime(2025, 3, 1, 9, tzinfo=UTC)}
    assert [(row["item_id"], row["price"], row["quantity"]) for row in rows] == [
        ("ä1", 12.5, 2.0),
        ("b", 3.0, 1.0),
    ]
    assert batch.numbers.to_pylist() == [1, 2]


def test_lists_in_lists_give_a_row_for_each_entry(shop: Shop) -> None:
    orders = [{"at": "2025-03-01", "lines": [{"sku": 1}, {"sku": 2}]}, {"at": "2025-03-02"}]
    shop.answer = lambda path, query: reply([{"user_id": "ann", "orders": orders}])
    mapping = {
        "ts": "orders.at",
        "event_type": {"value": "purchase"},
        "item_id": "orders.lines.sku",
    }
    source = open_source(shop, each="orders.lines", mapping=mapping)
    assert [row["item_id"] for row in read(source)] == ["1", "2"]


def test_what_is_no_list_on_the_way_to_an_entry_is_quarantined(shop: Shop) -> None:
    """It would be lost, or give a purchase of nothing."""
    parcels: list[Any] = [
        [{"lines": [{"sku": "a"}]}, "text", None, {"lines": None}, {"lines": "text"}],
        "none",
        None,
    ]
    shop.answer = lambda path, query: reply([event(1, parcels=found) for found in parcels])
    source = open_source(shop, each="parcels.lines", mapping={"item_id": "parcels.lines.sku"})
    (batch,) = source.read(Kind.EVENTS)
    assert [row["item_id"] for row in batch.table.to_pylist()] == ["a"]
    found = [(row["row"], row["reason"]) for row in batch.quarantined.to_pylist()]
    assert found == [(n, "not a JSON object") for n in (2, 3, 4)]


def test_keys_may_hold_dots(shop: Shop) -> None:
    def serve(path: str, query: dict[str, str]) -> Reply:
        following = {} if query else {"@odata.nextLink": "events?page=2"}
        return reply({"value": [event(1, **{"item.id": "i"})], "value.count": 1, **following})

    shop.answer = serve
    pages = {"by": "url", "path": "@odata.nextLink"}
    source = open_source(shop, pages=pages, mapping={"item_id": "item.id"})
    assert [row["item_id"] for row in read(source)] == ["i", "i"]


def test_records_that_give_no_row_are_quarantined(shop: Shop) -> None:
    body = json.dumps(
        [
            event(1, price="NaN"),
            "text",
            event(3, price=[{"amount": 1}]),
            event(4, query="\ud83d"),
            event(5, query="😀\u0000"),
            event(6, price="teuer"),
            event(7, price=float("nan")),
            event(8) | {"user_id": None},
        ]
    )
    shop.answer = lambda path, query: reply(body.encode())
    url = f"{shop.url}/events?access_token={SECRET}"
    source = RestSource(Rest.model_validate({"url": url}))
    (batch,) = source.read(Kind.EVENTS)
    assert (batch.rows, batch.anonymous) == (8, 1)
    found = batch.quarantined.to_pylist()
    assert [(row["row"], row["reason"]) for row in found] == [
        (2, "not a JSON object"),
        (3, "price holds a list or an object"),
        (4, "query holds half of a character"),
        (6, "price is not a number"),
    ]
    assert {row["source"] for row in found} == {f"{shop.url}/events?access_token=***"}
    assert all(isinstance(json.loads(row["record"]), dict) for row in found)
    assert [row["user_id"] for row in batch.table.to_pylist()] == ["u1", "u5", "u7"]
    assert SECRET not in json.dumps(source.fingerprint())


def test_rows_come_in_chunks_of_any_size(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [event(i) for i in range(1, 8)]
    shop.answer = lambda path, query: reply(rows if "page" not in query else [])
    source = open_source(shop)
    whole = source.fingerprint()
    monkeypatch.setattr("pipelines.sources.rest._ROWS_PER_CHUNK", 3)
    assert source.fingerprint() == whole
    batches = list(source.read(Kind.EVENTS))
    assert [batch.numbers.to_pylist() for batch in batches] == [[1, 2, 3], [4, 5, 6], [7]]
    assert source.fingerprint_read() == whole


def test_what_is_not_used_does_not_count_as_a_change(shop: Shop) -> None:
    asked = iter(range(100))
    price = 1.0

    def serve(path: str, query: dict[str, str]) -> Reply:
        row = event(1, price=price, stock=next(asked))
        return reply({"at": time.time(), "records": [row]})

    shop.answer = serve
    source = open_source(shop)
    first = source.fingerprint()
    assert source.fingerprint() == first
    price = 1.5
    assert source.fingerprint() != first


@pytest.mark.parametrize(
    ("answer", "options", "told"),
    [
        (reply({"data": {"a": []}}), {}, "no list in the answer; say in ingest.rest.records wh"),
        (reply({"a": [], "b\n": []}), {}, "more than one list in the answer; say in ingest.rest"),
        (reply({"a": [], "b\n": []}), {}, "which it is; found a, b?"),
        (reply("none"), {}, "no list in the answer"),
        (reply({"a": [], "b": 1}), {"records": "b"}, "no list at b (ingest.rest.records); fou"),
        (reply({"a": {"c": 1}}), {"records": "a.b"}, "no list at a.b (ingest.rest.records); found"),
        (reply(b"<html>Log in</html>", Content_Type="text/html"), {}, "is no JSON (text/html)"),
        (reply(b"\xff["), {}, "the answer is no JSON"),
        (reply(b"[1, 2"), {}, "the answer is no JSON"),
        (reply(b"[" * 100_000), {}, "the answer is nested too deep"),
        (reply([event(1)]), {"each": "lines"}, "no list at lines in any record (ingest.rest.each)"),
        (
            reply([event(1, **{"a\nb": 1})]),
            {"mapping": {"item_id": "line.sku"}},
            "no column line.sku in any record; found a?b, event_type, ts, user_id",
        ),
        (
            reply({"error": SECRET}, 401),
            {},
            ": answers 401 Unauthorized; FORECART_REST_HEADER is n",
        ),
        (reply([], 404), {"pages": {"by": "page", "parameter": "p"}}, "answers 404 Not Found"),
        (reply([], 302, Location="ftp://127.0.0.1/x"), {}, "leads to ftp, which is neither http n"),
        (reply([], 302, Location="http://[::1"), {}, "a redirect leads to what is no address"),
        (reply([], 302, Location="/events"), {}, "redirected more than 5 times"),
        (reply([], 304), {}, "answers 304 Not Modified"),
        (reply(b"no gzip", Content_Encoding="gzip"), {}, "the answer cannot be unpacked"),
        (reply(b"[", Content_Length="9"), {}, "the connection broke off, or what came is no HTTP"),
        (reply([event(1)]), {"each": "ts"}, "no list at ts in any record (ingest.rest.each)"),
    ],
)
def test_an_answer_that_cannot_be_used_is_told_in_one_line(
    shop: Shop, answer: Reply, options: dict[str, Any], told: str
) -> None:
    shop.answer = lambda path, query: answer
    line = refuse(open_source(shop, **options))
    assert line.startswith(f"{shop.url}/events")
    assert told in line
    assert SECRET not in line


@pytest.mark.parametrize("answer", [reply([]), reply(b"", 204), reply(b"null")])
def test_an_answer_without_records_is_none(shop: Shop, answer: Reply) -> None:
    shop.answer = lambda path, query: answer
    assert users(open_source(shop)) == []


# -- the way there ---------------------------------------------------------------------------


def test_a_busy_server_is_waited_for(shop: Shop) -> None:
    soon = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    answers = iter(
        [
            reply([], 429, Retry_After="1"),
            reply([], 503, Retry_After=soon),
            reply([], 500, Retry_After="\u00b2"),
            lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
            reply([event(1)]),
        ]
    )
    shop.answer = lambda path, query: next(answers)
    started = time.monotonic()
    assert [row["user_id"] for row in read(open_source(shop))] == ["u1"]
    assert 1 <= time.monotonic() - started < 3
    assert len(shop.asked) == 5


def test_a_server_that_stays_broken_is_given_up(shop: Shop) -> None:
    shop.answer = lambda path, query: reply([], 503)
    told = f"{shop.url}/events: answers 503 Service Unavailable, after 5 tries"
    assert refuse(open_source(shop)) == told
    assert len(shop.asked) == 10


def test_a_server_is_not_waited_for_as_long_as_it_likes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_LONGEST_PAUSE", 0.01)
    shop.answer = lambda path, query: reply([], 429, Retry_After="9" * 400)
    assert refuse(open_source(shop)).endswith("answers 429 Too Many Requests, after 5 tries")


def test_a_server_that_is_gone_is_told(shop: Shop) -> None:
    shop.close()
    told = f"{shop.url}/events: Connection refused, after 5 tries"
    assert refuse(open_source(shop)) == told


@pytest.mark.parametrize("chunked", [True, False])
def test_a_server_that_falls_silent_is_given_up(shop: Shop, chunked: bool) -> None:
    def stall(handler: Any) -> None:
        handler.send_response(200)
        name, value = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "99")
        handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"5\r\n[1, 2\r\n" if chunked else b"[1, 2")
        time.sleep(0.3)
        handler.close_connection = True

    shop.answer = lambda path, query: stall
    line = refuse(open_source(shop, patience=0.1))
    assert line == f"{shop.url}/events: no answer within 0.1 s, after 5 tries"


def test_a_server_that_drips_is_given_up(shop: Shop) -> None:
    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "99")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.03)

    shop.answer = lambda path, query: drip
    told = f"{shop.url}/events: no whole answer within 0.3 s, after 5 tries"
    with pytest.raises(UserError, match=re.escape(told)):
        open_source(shop, patience=0.06).fingerprint()


def test_packed_and_chunked_answers_are_read(shop: Shop) -> None:
    body = gzip.compress(json.dumps([event(1, query="naïve 😀")]).encode())

    def serve(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        for start in range(0, len(body), 7):
            part = body[start : start + 7]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    shop.answer = lambda path, query: serve
    assert read(open_source(shop))[0]["query"] == "naïve 😀"


def test_a_page_is_bounded_unpacked(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_MAX_BYTES", 1 << 20)
    body = gzip.compress(b" " * (1 << 24))
    assert len(body) < 1 << 17
    shop.answer = lambda path, query: reply(body, Content_Encoding="gzip")
    assert "a page of over 1 MiB; ask for fewer" in refuse(open_source(shop))


# -- the login -------------------------------------------------------------------------------


def test_the_login_is_sent_and_shown_nowhere(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEADER_VARIABLE, f"Authorization: Bearer {SECRET}\nX-Shop: north\n")
    shop.answer = lambda path, query: reply([event(1)])
    source = open_source(shop)
    found = source.fingerprint()
    assert SECRET not in json.dumps(found)
    assert shop.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert shop.asked[0][1]["X-Shop"] == "north"
    # A server that gives it back in an address does not bring it into a message, either.
    shop.answer = lambda path, query: reply([], 302, Location=f"/a?q={SECRET}&token=x")
    line = refuse(source)
    assert "/a?q=***&token=***: redirected" in line
    shop.answer = lambda path, query: reply([], 403)
    assert refuse(source).endswith("403 Forbidden; FORECART_REST_HEADER is not accepted")
    monkeypatch.setenv(HEADER_VARIABLE, "Authorization: Basic bm9ib2R5Om5v+/==")
    shop.answer = lambda path, query: reply([], 302, Location="/a?q=bm9ib2R5Om5v%2B%2F%3D%3D")
    assert "/a?q=***: redirected" in refuse(source)


def test_logins_of_other_programs_are_not_sent(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    open_source(shop).fingerprint()
    assert "Authorization" not in shop.asked[0][1]


@pytest.mark.parametrize("text", [SECRET, f"A b: {SECRET}", f"X: {SECRET}\x07", "X: \u20ac", "X:"])
def test_a_header_that_is_none_is_not_shown(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(HEADER_VARIABLE, text)
    line = refuse(open_source(shop))
    assert line == f'{HEADER_VARIABLE}: expected "Name: value", as in "X-Key: abc"'
    assert not shop.asked


@pytest.mark.parametrize("by", ["redirect", "link", "url"])
def test_the_login_goes_to_no_other_host(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv(HEADER_VARIABLE, f"Authorization: Bearer {SECRET}")
    other = Shop()
    try:
        for target, told in (
            (f"http://localhost:{other.port}/x", "leads to another host, localhost, which is not"),
            (other.url, f"leads to another host, 127.0.0.1:{other.port}, which is not asked"),
            # Some take this for the host before the backslash, some for the one after it.
            (f"http://evil.example\\@127.0.0.1:{shop.port}/", "another host, evil.example, which"),
            ("//evil.example/", "another host, evil.example, which"),
        ):
            found = {
                "redirect": reply([], 307, Location=target),
                "link": reply([event(1)], Link=f"<{target}>; rel=next"),
                "url": reply({"data": [event(1)], "next": target}),
            }[by]
            shop.answer = lambda path, query, found=found: found
            pages = (
                None if by == "redirect" else {"by": by, "path": "next" if by == "url" else None}
            )
            assert told in refuse(open_source(shop, pages=pages))
        assert not other.asked
    finally:
        other.close()


def test_a_step_from_https_to_http_is_refused() -> None:
    client = web.Client()
    for target in ("http://shop.example/b", "http://shop.example:443/b"):
        with pytest.raises(UserError, match="the next page leads from https to http"):
            client.follow("https://shop.example/a", target, "the next page")
    assert client.follow("http://shop.example/a", "https://SHOP.example/b", "") == (
        "https://SHOP.example/b"
    )


def test_redirects_on_the_same_host_are_followed(shop: Shop) -> None:
    def serve(path: str, query: dict[str, str]) -> Reply:
        return reply([event(1)]) if path == "/v2/events" else reply([], 308, Location="v2/events")

    shop.answer = serve
    assert users(open_source(shop)) == ["u1"]


# -- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ({}, "ingest: source: rest needs rest.url"),
        ({"url": "shop.example/orders"}, "ingest.rest: url: expected an address, such as https"),
        ({"url": "file:///etc/passwd"}, "ingest.rest: url: expected an address"),
        ({"url": "https://h:x/"}, "ingest.rest: url: expected an address"),
        ({"url": f"https://me:{SECRET}@h/"}, "ingest.rest: url: a login goes into the variable F"),
        ({"url": "https://h/", "page": {}}, "unknown key ingest.rest.page"),
        ({"url": "https://h/", "pages": {"by": "next"}}, "ingest.rest.pages.by"),
        ({"url": "https://h/", "pages": {"by": "cursor"}}, "ingest.rest.pages: by: cursor needs p"),
        ({"url": "https://h/", "pages": {"by": "page"}}, "by: page needs parameter"),
        (
            {"url": "https://h/", "pages": {"by": "link", "path": "next"}},
            "ingest.rest.pages: by: link has no use for path",
        ),
        ({"url": "https://h/", "pages": {"first": 0}}, "by: null has no use for first"),
        ({"url": "https://h/", "query": {"a": [SECRET]}}, "ingest.rest.query.a"),
        ({"url": "https://h/", "users": {"records": "a"}}, "ingest.rest: users needs a url"),
        ({"url": "https://h/", "items": "https://g/"}, "items: url is on another host than that"),
        ({"url": "https://h/", "query": {"to": "{until}"}}, "names {until}: set ingest.until"),
        ({"url": "https://h/", "mapping": {"user": "u"}}, "no such column: user"),
    ],
)
def test_a_mistake_in_the_settings_is_named(rest: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        config.parse_params({"ingest": {"source": "rest", "rest": rest}})
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_what_the_readme_shows_is_taken_by_dvc_as_well() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (part for part in text.split("```") if "source: rest" in part and "url:" in part)
    settings = yaml.safe_load(shown.removeprefix("yaml"))
    assert config.Params.model_validate(settings).ingest.rest.names_until
    json.dumps(settings)  # DVC stops at a date


def test_a_query_takes_what_yaml_gives(shop: Shop) -> None:
    text = f"""
        source: rest
        until: 2025-03-01T00:00:02Z
        rest:
            url: {shop.url}/events?status=any&sort=asc
            query: {{status: paid, limit: 250, all: true, since: 2025-01-01, before: "{{until}}"}}
    """
    params = config.parse_params({"ingest": yaml.safe_load(text)}).ingest
    RestSource(params.rest, params.until).fingerprint()
    ((path, _),) = shop.asked
    assert parse_qs(urlsplit(path).query) == {
        "sort": ["asc"],
        "status": ["paid"],
        "limit": ["250"],
        "all": ["true"],
        "since": ["2025-01-01"],
        "before": ["2025-03-01T00:00:02Z"],
    }


# -- the stages ------------------------------------------------------------------------------


def test_a_source_that_changes_stops_the_run(shop: Shop, tmp_path: Path) -> None:
    rows = [event(i) for i in range(1, 5)]
    shop.answer = lambda path, query: reply(rows)
    section = {
        "source": "rest",
        "rest": {"url": f"{shop.url}/events"},
        "until": "2025-03-01T00:00:03",
    }
    params = config.parse_params({"ingest": section})
    fingerprint.run(params, tmp_path)
    assert "2 events of 2 users" in ingest.run(params, tmp_path)
    report = json.loads((tmp_path / "reports/ingest.json").read_text())
    assert (report["rows"], report["after_until"]) == (4, 2)
    rows[3]["price"] = 2
    with pytest.raises(UserError, match=r"the source is not what data/source\.json describes"):
        ingest.run(params, tmp_path)


def test_nested_values_are_told_with_what_to_do(shop: Shop, tmp_path: Path) -> None:
    shop.answer = lambda path, query: reply([event(1, item_id={"sku": 1})])
    params = config.parse_params({"ingest": {"source": "rest", "rest": {"url": shop.url}}})
    fingerprint.run(params, tmp_path)
    with pytest.raises(UserError, match=r"a dotted name such as customer\.id reaches into an obj"):
        ingest.run(params, tmp_path)


def test_the_command_line_reads_it(shop: Shop, tmp_path: Path) -> None:
    def serve(path: str, query: dict[str, str]) -> Reply:
        return serve_linked(shop, path, query) if path == "/events" else reply([], 403)

    shop.answer = serve
    rest = {"url": f"{shop.url}/events?key={SECRET}", "pages": {"by": "link"}}

    def run(stage: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump({"ingest": section}))
        return subprocess.run(
            [sys.executable, "-m", "pipelines.cli", stage],
            cwd=tmp_path,
            env=os.environ | {HEADER_VARIABLE: f"X-Key: {SECRET}", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    section = {"source": "rest", "rest": rest}
    first, second = run("fingerprint"), run("ingest")
    assert (first.returncode, first.stderr) == (0, "")
    assert second.returncode == 0, second.stderr
    assert "2 events of 2 users" in second.stdout
    source = (tmp_path / "data/source.json").read_text()
    assert f"{shop.url}/events?key=***" in source
    section["rest"] = {"url": f"{shop.url}/orders"}
    third = run("fingerprint")
    assert third.returncode == 2
    assert third.stderr == (
        f"forecart: {shop.url}/orders: answers 403 Forbidden;"
        " FORECART_REST_HEADER is not accepted\n"
    )
    assert SECRET not in source + "".join(p.stdout + p.stderr for p in (first, second, third))
    assert {asked[1]["X-Key"] for asked in shop.asked} == {SECRET}
