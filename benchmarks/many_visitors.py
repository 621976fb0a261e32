"""Seconds and memory of every stage on the log of a shop whose visitors mostly come once.

Method: visitors arrive evenly over 137 days. One in twelve returns, every nine days on average; a
visit is one or two events. There are no prices and no searches, and less than one event in a
hundred is a purchase. So it is in Retailrocket's log, which Kaggle has (2,756,101 events of
1,407,580 visitors in as many days). The log is a CSV file, shuffled. In a fresh clone of the
committed code `forecart STAGE` runs for one stage after the other, each in a process of its own, of
which the wall time and the largest resident set are told.

    python -m benchmarks.many_visitors [--visitors 1400000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import yaml

from benchmarks.orchestration import clone
from pipelines.cli import STAGES

DAYS = 137
START = datetime(2025, 5, 3, tzinfo=UTC)
RETURNING, VISITS, GAP_DAYS = 1 / 12, 4.5, 9.0
ITEMS = 235_000
EVENT_TYPES = np.array(["view", "addtocart", "transaction"])
CHANCES = {False: (0.964, 0.03, 0.006), True: (0.943, 0.045, 0.012)}  # by whether one returns


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=1_400_000)
    visitors = parser.parse_args().visitors
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        log = Path(folder) / "events.csv"
        events = make_log(visitors, np.random.default_rng(5))
        pacsv.write_csv(events, log)
        project = clone(Path(folder) / "project")
        set_source(project / "params.yaml", log)
        told: dict[str, Any] = {"events": events.num_rows, "visitors": visitors, "stages": {}}
        del events
        for stage in STAGES:
            told["stages"][stage] = run(project, stage)
            print(json.dumps({stage: told["stages"][stage]}), file=sys.stderr, flush=True)
    stages = told["stages"].values()
    told["seconds"] = round(sum(stage["seconds"] for stage in stages))
    told["peak_mib"] = max(stage["peak_mib"] for stage in stages)
    print(json.dumps(told, indent=2))


def make_log(visitors: int, rng: np.random.Generator) -> pa.Table:
    """Return timestamp (ms), visitorid, event and itemid, in no order."""
    returns = rng.random(visitors) < RETURNING
    visits = np.where(returns, 1 + rng.geometric(1 / VISITS, visitors), 1)
    visitor = np.repeat(np.arange(visitors), visits)
    first = np.cumsum(visits) - visits
    gap = rng.exponential(GAP_DAYS, len(visitor))
    gap[first] = rng.uniform(0, DAYS, visitors)
    total = np.cumsum(gap)
    day = total - np.repeat(total[first] - gap[first], visits)
    inside = day < DAYS
    visitor, day = visitor[inside], day[inside]

    size = rng.geometric(0.62, len(visitor))
    visitor, day = np.repeat(visitor, size), np.repeat(day, size)
    ms = day * 86_400_000 + rng.exponential(90_000, len(day))
    chance = rng.random(len(day))
    bounds = {again: np.cumsum(shares)[:2] for again, shares in CHANCES.items()}
    kind = np.where(
        returns[visitor],
        np.searchsorted(bounds[True], chance),
        np.searchsorted(bounds[False], chance),
    )
    item = rng.zipf(1.25, len(day)) % ITEMS
    order = rng.permutation(len(day))
    begin = int(START.timestamp() * 1000)
    return pa.table(
        {
            "timestamp": (begin + ms[order]).astype(np.int64),
            "visitorid": visitor[order],
            "event": EVENT_TYPES[kind[order]],
            "itemid": item[order],
        }
    )


def set_source(path: Path, log: Path) -> None:
    """Let the settings name the log and its columns."""
    params = yaml.safe_load(path.read_text())
    params["ingest"]["source"] = "files"
    params["ingest"]["files"] |= {
        "path": str(log),
        "mapping": {
            "user_id": "visitorid",
            "ts": {"column": "timestamp", "unit": "ms"},
            "event_type": {
                "column": "event",
                "values": {"view": "view", "addtocart": "add_to_cart", "transaction": "purchase"},
            },
            "item_id": "itemid",
        },
    }
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def run(project: Path, stage: str) -> dict[str, float]:
    """Run one stage to its end; return its wall time and its largest resident set."""
    environment = os.environ | {"PYTHONPATH": str(project)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", stage],
        cwd=project,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} ended with {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


if __name__ == "__main__":
    main()
