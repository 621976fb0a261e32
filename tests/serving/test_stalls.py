"""A database that takes connections and never answers is given up within seconds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from serving.stalls import CONNECT_SECONDS, READ_SECONDS, plan_waiting
from serving.store import Store


@contextmanager
def run_silent_server() -> Iterator[int]:
    """Take connections and say nothing in them."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        try:
            yield int(server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                connection.close()


@pytest.mark.integration
def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    def use(backend: str) -> float:
        store = Store(f"{backend}://u:p@127.0.0.1:{port}/x")
        began = time.monotonic()
        with pytest.raises(SQLAlchemyError):
            store.create()
        store.close()
        return time.monotonic() - began

    backends = ("postgresql", "mysql", "mariadb")
    with run_silent_server() as port, ThreadPoolExecutor(len(backends)) as pool:
        seconds = list(pool.map(use, backends))
    assert max(seconds) < CONNECT_SECONDS + READ_SECONDS + 2, seconds


def test_what_the_address_says_itself_is_left() -> None:
    url = make_url("mysql+pymysql://u@h/x?read_timeout=60")
    assert plan_waiting(url)["connect_args"] == {
        "connect_timeout": CONNECT_SECONDS,
        "write_timeout": READ_SECONDS,
    }


def test_a_file_has_no_server_to_wait_for() -> None:
    assert plan_waiting(make_url("sqlite:////x.db")) == {}
    Store("sqlite:///:memory:").close()
