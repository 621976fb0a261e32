"""What asks the service: wrk, which sends again when it is answered, and requests at a rate."""

from __future__ import annotations

import json
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

NOW: Final = datetime(2025, 3, 1, tzinfo=UTC)

# What wrk runs: sends a file's content, and ends with its figures as JSON, times in microseconds.
_SCRIPT: Final = """
local file = io.open(os.getenv("BODY"), "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = "application/json"
file:close()

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\\n{"answers": %d, "microseconds": %d, "refused": %d, "failed": %d, "p50": %d, "p99": %d}\\n',
    summary.requests, summary.duration, errors.status, failed,
    latency:percentile(50), latency:percentile(99)))
end
"""


class Steady(NamedTuple):
    """What came of requests each of which followed the answer to the last one.

    Attributes:
        rate: good answers a second.
        p50, p99: milliseconds to an answer.
        bad: answers that were refusals or errors, and requests without one.
    """

    rate: float
    p50: float
    p99: float
    bad: int


def send_steadily(port: int, path: str, body: bytes, connections: int, seconds: float) -> Steady:
    """Let wrk send the next request on a connection when the last one is answered.

    It is written in C and takes next to nothing of the machine that it shares with the service.

    Raises:
        SystemExit: there is no wrk, or it failed.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit(
            "wrk, which sends the requests, is missing; on Debian: apt-get install wrk"
        )
    with tempfile.TemporaryDirectory() as folder:
        script, content = Path(folder, "send.lua"), Path(folder, "body.json")
        script.write_text(_SCRIPT)
        content.write_bytes(body)
        url = f"http://127.0.0.1:{port}{path}"
        flags = ["-t1", f"-c{connections}", f"-d{round(seconds)}s", "-s", str(script)]
        ended = subprocess.run(
            [wrk, *flags, url],
            env={"BODY": str(content)},
            capture_output=True,
            text=True,
            check=False,
        )
    if ended.returncode:
        raise SystemExit(f"wrk failed: {ended.stderr.strip() or ended.stdout.strip()}")
    told = json.loads(ended.stdout.splitlines()[-1])
    good = told["answers"] - told["refused"]
    return Steady(
        rate=good / (told["microseconds"] / 1e6),
        p50=told["p50"] / 1e3,
        p99=told["p99"] / 1e3,
        bad=told["refused"] + told["failed"],
    )


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
