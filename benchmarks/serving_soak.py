"""Whether the service's memory stays flat under load.

    python -m benchmarks.serving_soak --model models/gpt [--minutes 15]

Requests of one shopper with 1 to 200 events, at a share of what a few connections are answered
when they send one after the other. The resident memory of the server's processes is sampled every
five seconds; the slope is that of a straight line through the samples after the first fifth.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.generators import Seen, make_body, make_payload, send_at_rate, send_steadily
from benchmarks.serving_load import serve

EVERY_SECONDS = 5.0
PAYLOADS = 64
WARM_UP = 0.2


def sample_memory(stop: threading.Event, samples: list[tuple[float, int]]) -> None:
    """Note seconds and the resident bytes of all processes that this one has started."""
    began = time.perf_counter()
    while not stop.wait(EVERY_SECONDS):
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        samples.append((time.perf_counter() - began, total))


def describe_memory(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Return the ends and the slope of what was sampled, in MiB."""
    rows = np.array(samples)[int(WARM_UP * len(samples)) :]
    seconds, mib = rows[:, 0], rows[:, 1] / 2**20
    slope, _ = np.polyfit(seconds / 3600, mib, 1)
    quarter = max(1, len(mib) // 4)
    return {
        "samples": len(mib),
        "first_quarter_mib": round(float(np.median(mib[:quarter])), 1),
        "last_quarter_mib": round(float(np.median(mib[-quarter:])), 1),
        "highest_mib": round(float(mib.max()), 1),
        "slope_mib_per_hour": round(float(slope), 1),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--connections", type=int, default=32, help="that find the rate")
    parser.add_argument("--share", type=float, default=0.5, help="of what they are answered")
    options = parser.parse_args()
    rng = np.random.default_rng(7)
    payloads = [
        make_payload("/predict", make_body(int(events), seed))
        for seed, events in enumerate(rng.integers(1, 201, PAYLOADS))
    ]
    samples: list[tuple[float, int]] = []
    stop = threading.Event()
    whole = Seen()
    environment = {"FORECART_MODEL": str(options.model.resolve())}
    with serve("serving.service:Forecart", environment) as port:
        body = json.dumps(make_body(100)).encode()
        for seconds in (3, 10):
            found = send_steadily(port, "/predict", body, options.connections, seconds)
        rate = options.share * found.rate
        sampler = threading.Thread(target=sample_memory, args=(stop, samples))
        sampler.start()
        began = time.perf_counter()
        while (left := options.minutes * 60 - (time.perf_counter() - began)) > 0:
            seen, _ = send_at_rate(port, payloads, rate, min(60.0, max(1.0, left)))
            whole.join(seen)
        wall = time.perf_counter() - began
        stop.set()
        sampler.join()
    found_memory = describe_memory(samples)
    told = {
        "minutes": round(wall / 60, 1),
        "offered_per_second": round(rate, 1),
        "answers": dict(whole.statuses),
        "times": whole.describe(wall),
        **found_memory,
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
