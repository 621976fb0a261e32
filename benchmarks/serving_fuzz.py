"""Tens of thousands of hostile requests: how many get a 5xx answer, or none.

    python -m benchmarks.serving_fuzz --model models/gpt [--requests 20000] [--minutes 20]

First schemathesis, from the service's own description; then hypothesis, which changes good requests
in one or two places, cuts and garbles them, and makes up addresses. Requests and statuses are
counted by the service itself (its metrics), hangs and dropped connections by the clients. At last
a good request has to be answered as it was before. `make test` installs both, `make run` does not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

try:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    sys.exit("hypothesis and schemathesis are not installed; make test installs them, make run not")

from benchmarks.generators import NOW, make_body
from benchmarks.serving_load import serve

TIMEOUT_SECONDS = 20.0
_COUNT = re.compile(
    r'^forecart_request_seconds_count\{route="([^"]*)",status="(\d+)"\} (\S+)', re.M
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
TEXTS = st.text(max_size=300) | st.sampled_from(["", "\0", "..", "a/b", "%", "\ud800", "🛍" * 257])
EVENT = {"event_type": "view", "ts": "2025-02-01T00:00:00Z", "item_id": "i", "price": 1.5}
USER = make_body(3)["users"][0]
GOOD: dict[str, dict[str, Any]] = {
    "/predict": make_body(5),
    "/explain": {"user": USER, "target": "purchase_14d", "now": NOW.isoformat()},
    "/events": {"events": [EVENT | {"user_id": "ann"}]},
    "/users/predict": {"user_ids": ["ann"], "next_items": 3},
    "/users/erase": {"user_id": "ann"},
}


def list_places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to everything within a JSON value."""
    places = [place]
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(pairs)[:6]:
            places += list_places(inner, (*place, key))
    return places


def replace_at(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return a value with another one at a path."""
    if not place:
        return new
    changed = value.copy()
    changed[place[0]] = replace_at(value[place[0]], place[1:], new)
    return changed


@st.composite
def bodies(draw: Any) -> tuple[str, bytes]:
    """Draw a route and a body that is wrong in one or two places, or garbled."""
    route = draw(st.sampled_from(sorted(GOOD)))
    body: Any = GOOD[route]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(list_places(body)))
        body = replace_at(body, place, draw(JSON | TEXTS))
    raw = json.dumps(body).encode()
    garble = draw(st.sampled_from(["no", "no", "no", "cut", "bytes", "deep", "noise"]))
    if garble == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif garble == "bytes":
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at + 1 :]
    elif garble == "deep":
        raw = raw[:-1] + b',"x":' + b"[" * draw(st.integers(1, 5000))
    elif garble == "noise":
        raw = draw(st.binary(max_size=200))
    return route, raw


@st.composite
def addresses(draw: Any) -> str:
    """Draw an address of one shopper, percent-encoded or not."""
    text = draw(TEXTS).encode("utf-8", "surrogatepass")
    user = quote(text, safe=draw(st.sampled_from(["", "/", "%:@"]))) or "-"
    part = draw(st.sampled_from(["", "/prediction", "/next-items", "/explanation", "/x"]))
    names = st.sampled_from(["now", "next_items", "count", "target", "x"])
    query = draw(st.dictionaries(names, TEXTS | st.integers().map(str), max_size=2))
    encoded = (f"{k}={quote(v.encode('utf-8', 'surrogatepass'))}" for k, v in query.items())
    return f"/users/{user}{part}?{'&'.join(encoded)}"


REQUESTS = st.one_of(
    bodies().map(lambda drawn: ("POST", *drawn)),
    st.tuples(
        st.sampled_from(["GET", "PUT", "DELETE", "POST", "PATCH", "OPTIONS"]),
        addresses(),
        st.just(b"") | st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()),
    ),
)


class Client:
    """Sends requests on one connection, and notes what gets no answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = self._connect()
        self.troubles: Counter[str] = Counter()
        self.examples: list[str] = []

    def send(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a request; return status and body, status 0 where there was no answer."""
        try:
            headers = {"content-type": "application/json"}
            self._connection.request(method, path, body=body, headers=headers)
            answer = self._connection.getresponse()
            status, content = answer.status, answer.read()
        except TimeoutError:
            status, content = self._note("hang", method, path, body), b""
        except (OSError, http.client.HTTPException):
            status, content = self._note("dropped", method, path, body), b""
        if status >= 500:
            self._note(str(status), method, path, body)
        return status, content

    def _note(self, what: str, method: str, path: str, body: bytes) -> int:
        self.troubles[what] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{what}: {method} {path[:200]} {body[:200]!r}")
        self._connection.close()
        self._connection = self._connect()
        return 0

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_SECONDS)


def count_requests(port: int) -> Counter[str]:
    """Ask the service how many requests it has answered, by status."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        content = answer.read()
    counts: Counter[str] = Counter()
    for _, status, count in _COUNT.findall(content.decode()):
        counts[status] += int(float(count))
    return counts


def run_schemathesis(port: int, examples: int, seconds: float) -> str:
    """Draw requests from the description; return the last line of the report."""
    command = [
        *[str(Path(sys.executable).parent / "st"), "run", f"http://127.0.0.1:{port}/docs.json"],
        *["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"],
        *["--mode", "all", "--max-examples", str(examples), "--seed", "1"],
        *["--request-timeout", str(int(TIMEOUT_SECONDS)), "--continue-on-failure"],
        *["--include-path-regex", "^/(predict|events|explain|users)"],
        *["--suppress-health-check", "all", "--no-color"],
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return done.stdout.strip().splitlines()[-1].strip("= ")


def main() -> int:
    """Send, count and print one JSON object; 1 if anything got a 5xx answer or none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--requests", type=int, default=20_000, help="of hypothesis")
    parser.add_argument("--examples", type=int, default=300, help="of schemathesis, a call")
    parser.add_argument("--minutes", type=float, default=20.0, help="at most, of each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "FORECART_MODEL": str(options.model.resolve()),
            "FORECART_STORE": f"sqlite:///{folder}/events.db",
        }
        with serve("serving.service:Forecart", environment) as port:
            good = json.dumps(GOOD["/predict"]).encode()
            before = Client(port).send("POST", "/predict", good)
            said = run_schemathesis(port, options.examples, options.minutes * 60)
            drawn = count_requests(port)
            # The server closes connections that idle, so the client's is opened only now.
            client = Client(port)
            until = time.perf_counter() + options.minutes * 60

            @seed(1)
            @settings(
                max_examples=options.requests,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(REQUESTS)
            def fuzz(request: tuple[str, str, bytes]) -> None:
                if time.perf_counter() < until:
                    client.send(*request)

            fuzz()
            counts = count_requests(port)
            same = Client(port).send("POST", "/predict", good) == before
    refused = sum(count for status, count in counts.items() if status >= "500")
    found = {
        "schemathesis": {"requests": drawn.total(), "said": said},
        "requests": counts.total(),
        "statuses": dict(sorted(counts.items())),
        "without_answer": dict(client.troubles),
        "examples": client.examples,
        "good_request_answered_as_before": same,
    }
    print(json.dumps(found, indent=2))
    return int(bool(refused or client.troubles or not same))


if __name__ == "__main__":
    sys.exit(main())
