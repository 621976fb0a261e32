"""Seconds from a source to features, beside what DuckDB itself needs to rewrite the same events.

Method: a simulated shop of about a million events is written to Parquet once, as a shop's export
would be. Then, each in this process and repeated:

    ingest     the stage: schema, content hashes, repeats, day partitions
    features   the stage: sequences, snapshot features of all cuts, labels (validation left out)
    floor      DuckDB reads the ingested events, sorts them by user, time and id, and writes one
               Parquet file: the least that any feature build must do

The median of the repeats is told, with the ratio of ingest plus features to the floor.

    python benchmarks/feature_build.py [--users 8700] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipelines.config import parse_params
from pipelines.sources.simulator import SimulatorParams, simulate
from pipelines.stages import features, fingerprint, ingest


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=8700)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        root = Path(folder)
        shop = simulate(SimulatorParams(users=given.users))
        pq.write_table(shop.events, root / "export.parquet")
        params = parse_params(
            {"ingest": {"source": "files", "files": {"path": str(root / "export.parquet")}}}
        )
        fingerprint.run(params, root)
        seconds: dict[str, list[float]] = {"ingest": [], "features": [], "floor": []}
        for _ in range(given.repeats):
            seconds["ingest"].append(take_time(lambda: ingest.run(params, root)))
            valid = root / "data/valid"
            if not valid.exists():
                valid.symlink_to(root / "data/events")
            seconds["features"].append(take_time(lambda: features.run(params, root)))
            seconds["floor"].append(take_time(lambda: rewrite(root)))
        median = {name: statistics.median(values) for name, values in seconds.items()}
        both = median["ingest"] + median["features"]
        result = {
            "events": shop.events.num_rows,
            "cores": os.cpu_count(),
            "seconds": {name: round(value, 2) for name, value in median.items()},
            "events_per_s": round(shop.events.num_rows / both),
            "ratio_to_floor": round(both / median["floor"], 2),
        }
    print(json.dumps(result, indent=2))


def take_time(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rewrite(root: Path) -> None:
    """Read all events, sort them and write them, by DuckDB alone."""
    with duckdb.connect() as connection:
        events = connection.read_parquet(str(root / "data/events/*/*.parquet"))
        events.order("user_id, ts, event_id").write_parquet(str(root / "sorted.parquet"))


if __name__ == "__main__":
    main()
