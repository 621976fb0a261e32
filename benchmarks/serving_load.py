"""How many predictions a second the service answers, beside an empty endpoint of the same server.

    python benchmarks/serving_load.py --model models/gpt

A shopper a request, with 100 events. First as many requests as so many connections can send, one
after the other, to both endpoints in turn for two seconds each, in an order drawn by chance: a
machine that is lent in slices changes its speed within a minute. The throughput of either is the
most it answers, with however many connections. Then requests at a share of the service's, whatever
is answered (the rated load); then at three times the rated load, all of it and what came after the
first second, in which a flood is not told from a burst yet.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bentoml
import numpy as np

from serving.tracing import plan_tracing

ROOT = Path(__file__).resolve().parents[1]
_SLICE = 2.0  # seconds
NOW = datetime(2025, 3, 1, tzinfo=UTC)


@bentoml.service(
    name="empty",
    workers=1,
    traffic={"timeout": 30, "max_concurrency": 512},
    logging={"access": {"enabled": False}},
    tracing=plan_tracing(),
)
class Empty:
    """Does nothing, in the same server."""

    @bentoml.api(route="/empty")  # type: ignore[untyped-decorator]
    async def empty(self) -> dict[str, str]:
        """Answer."""
        return {}


@dataclass(kw_only=True)
class Seen:
    """What came of requests.

    Attributes:
        statuses: HTTP status -> count; 0 is a connection that failed.
        seconds: of the answers, by status.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.statuses[status] += 1
        self.seconds.setdefault(status, []).append(seconds)

    def join(self, other: Seen) -> None:
        """Count another's answers, too."""
        self.statuses += other.statuses
        for status, seconds in other.seconds.items():
            self.seconds.setdefault(status, []).extend(seconds)

    def describe(self, wall: float) -> str:
        """Return rate, counts and percentiles by status."""
        parts = []
        for status, times in sorted(self.seconds.items()):
            p50, p90, p99 = np.quantile(times, [0.5, 0.9, 0.99]) * 1000
            rate = len(times) / wall
            times_told = f"p50 {p50:.1f}, p90 {p90:.1f}, p99 {p99:.1f} ms"
            parts.append(f"{status}: {rate:.0f}/s, {times_told}")
        return "; ".join(parts)


async def request(reader: Any, writer: Any, payload: bytes) -> int:
    """Send a request on an open connection; return the status."""
    writer.write(payload)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    await reader.readexactly(length)
    return int(head.split()[1])


async def send_steadily(port: int, payload: bytes, connections: int, seconds: float) -> Seen:
    """Send the next request on a connection when the last one is answered."""
    seen = Seen()
    until = time.perf_counter() + seconds

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < until:
            seen.add(await request(reader, writer, payload), time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(send() for _ in range(connections)))
    return seen


def send_at_rate(
    port: int, payloads: Sequence[bytes], rate: float, seconds: float, seed: int = 1
) -> tuple[Seen, Seen]:
    """Send requests in turn at a rate, whether or not the earlier ones are answered.

    They come by chance, as from many shoppers who know nothing of each other (a Poisson process),
    and their time counts from when they were due. One loop over plain sockets takes .13 to .18
    ms of processor a request, so that little of the machine goes to the asking.

    Returns:
        What came of all, and of those due after the first second.
    """
    rng = np.random.default_rng(seed)
    due = np.sort(rng.uniform(0.0, seconds, int(rate * seconds))).tolist()
    seen, late = Seen(), Seen()
    with selectors.DefaultSelector() as ready:
        idle: list[socket.socket] = []
        # Those that have brought an answer; what was asked, and what has come of its answer.
        proven: set[socket.socket] = set()
        busy: dict[socket.socket, tuple[int, bytearray]] = {}
        began = time.perf_counter()

        def ask(number: int, *, anew: bool) -> None:
            if idle and not anew:
                asked = idle.pop()
            else:
                asked = socket.create_connection(("127.0.0.1", port))
                ready.register(asked, selectors.EVENT_READ)
            busy[asked] = number, bytearray()
            # A connection that the server has just closed is found out by reading.
            with suppress(OSError):
                asked.sendall(payloads[number % len(payloads)])

        def end(asked: socket.socket, status: int) -> None:
            number, _ = busy.pop(asked)
            took = time.perf_counter() - began - due[number]
            for counted in (seen, late) if due[number] > 1.0 else (seen,):
                counted.add(status, took)

        def close(asked: socket.socket) -> None:
            ready.unregister(asked)
            asked.close()
            if asked not in busy:
                idle.remove(asked)
            elif asked in proven:
                # It had idled for too long.
                ask(busy.pop(asked)[0], anew=True)
            else:
                end(asked, 0)

        sent = 0
        while sent < len(due) or (busy and time.perf_counter() - began < seconds + 30):
            while sent < len(due) and due[sent] <= time.perf_counter() - began:
                ask(sent, anew=False)
                sent += 1
            wait = due[sent] - (time.perf_counter() - began) if sent < len(due) else 0.1
            for key, _ in ready.select(max(0.0, wait)):
                asked: Any = key.fileobj
                try:
                    part = asked.recv(1 << 16)
                except OSError:
                    part = b""
                if not part:
                    close(asked)
                    continue
                answer = busy[asked][1]
                answer += part
                if (status := _read_status(answer)) is not None:
                    end(asked, status)
                    proven.add(asked)
                    idle.append(asked)
        for asked in list(busy):
            end(asked, 0)
        for key in list(ready.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return seen, late


def _read_status(answer: bytearray) -> int | None:
    """Return the status of an answer; None while it is not whole."""
    head = answer.find(b"\r\n\r\n")
    if head < 0:
        return None
    length = int(answer[:head].lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return int(answer[9:12]) if len(answer) >= head + 4 + length else None


def make_payload(path: str, body: Any) -> bytes:
    """Return a whole HTTP request."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def make_body(events: int, seed: int = 1) -> dict[str, Any]:
    """Return a request for one shopper."""
    rng = np.random.default_rng(seed)
    minutes = np.sort(rng.integers(1, 60 * 24 * 60, events))[::-1]
    history = [
        {
            "event_type": str(rng.choice(["view", "search", "add_to_cart", "purchase"])),
            "ts": (NOW - timedelta(minutes=int(m))).isoformat(),
            "item_id": f"sku-{rng.integers(500)}",
            "category": f"c{rng.integers(9)}",
            "price": float(rng.integers(1, 100)),
        }
        for m in minutes
    ]
    return {"users": [{"user_id": "ada", "events": history}], "now": NOW.isoformat()}


@contextmanager
def serve(service: str, environment: dict[str, str]) -> Iterator[int]:
    """Serve on a free port until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "bentoml", "serve", service, "--working-dir", str(ROOT)]
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ
            | {"BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT)}
            | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise SystemExit("the server did not start")


def compare(ends: dict[str, tuple[int, bytes]], connections: int, rounds: int) -> dict[str, float]:
    """Ask both endpoints in turn; print what they answered, and return how many a second."""
    seen = {name: Seen() for name in ends}
    ratios = []
    rng = np.random.default_rng(connections)
    for _ in range(rounds):
        slices = {}
        for name in rng.permutation(list(ends)):
            slices[name] = asyncio.run(send_steadily(*ends[name], connections, _SLICE))
            seen[name].join(slices[name])
        ratios.append(slices["forecart"].statuses[200] / slices["empty"].statuses[200])
    seconds = rounds * _SLICE
    rate = {name: part.statuses[200] / seconds for name, part in seen.items()}
    print(f"{connections} connections")
    for name, part in seen.items():
        print(f"  {name:<8}        {part.describe(seconds)}")
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(
        f"  ratio           {rate['forecart'] / rate['empty']:.3f}; of single slices: median "
        f"{middle:.3f}, quartiles {low:.3f} and {high:.3f}",
        flush=True,
    )
    return rate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--events", type=int, default=100, help="of the shopper")
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seconds", type=float, default=16.0, help="of every measurement")
    parser.add_argument("--share", type=float, default=0.6, help="of the most: the rated load")
    options = parser.parse_args()
    model = {"FORECART_MODEL": str(options.model.resolve())}

    with (
        serve("benchmarks.serving_load:Empty", {}) as empty,
        serve("serving.service:Forecart", model) as port,
    ):
        payload = make_payload("/predict", make_body(options.events))
        ends = {"empty": (empty, make_payload("/empty", {})), "forecart": (port, payload)}
        for end in ends.values():
            asyncio.run(send_steadily(*end, max(options.connections), _SLICE))
        rounds = max(1, round(options.seconds / _SLICE))
        rates = {
            connections: compare(ends, connections, rounds) for connections in options.connections
        }
        most = {name: max(rate[name] for rate in rates.values()) for name in ends}
        print(
            f"the most: empty {most['empty']:.0f}/s, forecart {most['forecart']:.0f}/s, "
            f"ratio {most['forecart'] / most['empty']:.3f}"
        )
        rated, seconds = options.share * most["forecart"], rounds * _SLICE
        for rate in (rated, 3 * rated):
            began = time.perf_counter()
            answered, late = send_at_rate(port, [payload], rate, seconds)
            # Until the last answer: a backlog must not pass for throughput.
            wall = time.perf_counter() - began
            print(f"{rate:.0f}/s offered      {answered.describe(wall)}")
            print(f"  after the first s {late.describe(wall - 1)}")
            time.sleep(1.0)


if __name__ == "__main__":
    main()
