"""How many predictions a second the service answers, beside an empty endpoint of the same server.

    python -m benchmarks.serving_load --model models/gpt

A shopper a request, with 100 events. First as many requests as so many connections can send, one
after the other, to both endpoints in turn for two seconds each, in an order drawn by chance: a
machine that is lent in slices changes its speed within a minute. Then requests at a share of the
most that the service answered, whatever is answered (the rated load); then at three times the rated
load, all of it and what came after the first second, in which a flood is not told from a burst yet.
wrk sends the first, which Debian has as a package.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import bentoml
import numpy as np

from benchmarks.generators import (
    Steady,
    make_body,
    make_payload,
    send_at_rate,
    send_steadily,
)
from serving.tracing import plan_tracing

ROOT: Final = Path(__file__).resolve().parents[1]
_SLICE: Final = 2.0  # seconds


class End(NamedTuple):
    """An endpoint, and what is sent to it."""

    port: int
    path: str
    body: bytes


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


def compare(ends: dict[str, End], connections: int, rounds: int) -> dict[str, float]:
    """Ask both endpoints in turn; print what they answered, and return how many a second."""
    seen: dict[str, list[Steady]] = {name: [] for name in ends}
    rng = np.random.default_rng(connections)
    for _ in range(rounds):
        for name in rng.permutation(list(ends)):
            seen[name].append(send_steadily(*ends[name], connections, _SLICE))
    print(f"{connections} connections")
    for name, slices in seen.items():
        rate, p50, p99 = (
            np.mean([part.rate for part in slices]),
            np.median([part.p50 for part in slices]),
            np.median([part.p99 for part in slices]),
        )
        bad = sum(part.bad for part in slices)
        print(f"  {name:<9} {rate:.0f}/s, p50 {p50:.1f}, p99 {p99:.1f} ms, not answered {bad}")
    rates = {name: [part.rate for part in slices] for name, slices in seen.items()}
    ratio = np.mean(rates["forecart"]) / np.mean(rates["empty"])
    low, middle, high = np.quantile(np.divide(rates["forecart"], rates["empty"]), [0.25, 0.5, 0.75])
    print(
        f"  ratio     {ratio:.3f}; of single slices: median {middle:.3f}, quartiles {low:.3f} and "
        f"{high:.3f}",
        flush=True,
    )
    return {name: float(np.mean(slices)) for name, slices in rates.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--events", type=int, default=100, help="of the shopper")
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seconds", type=float, default=16.0, help="of every measurement")
    parser.add_argument("--share", type=float, default=0.5, help="of the most: the rated load")
    options = parser.parse_args()
    model = {"FORECART_MODEL": str(options.model.resolve())}
    asked = make_body(options.events)

    with (
        serve("benchmarks.serving_load:Empty", {}) as empty,
        serve("serving.service:Forecart", model) as port,
    ):
        ends = {
            "empty": End(empty, "/empty", b"{}"),
            "forecart": End(port, "/predict", json.dumps(asked).encode()),
        }
        for end in ends.values():
            send_steadily(*end, max(options.connections), _SLICE)
        rounds = max(1, round(options.seconds / _SLICE))
        rates = {
            connections: compare(ends, connections, rounds) for connections in options.connections
        }
        most = {name: max(rate[name] for rate in rates.values()) for name in ends}
        print(
            f"the most: empty {most['empty']:.0f}/s, forecart {most['forecart']:.0f}/s, "
            f"ratio {most['forecart'] / most['empty']:.3f}"
        )
        payload = make_payload("/predict", asked)
        rated, seconds = options.share * most["forecart"], rounds * _SLICE
        for rate in (rated, 3 * rated):
            began = time.perf_counter()
            answered, late = send_at_rate(port, [payload], rate, seconds)
            # Until the last answer: a backlog must not pass for throughput.
            wall = time.perf_counter() - began
            print(f"{rate:.0f}/s offered      {answered.describe(wall)}")
            print(f"  after the first s {late.describe(wall - 1)}", flush=True)
            time.sleep(1.0)


if __name__ == "__main__":
    main()
