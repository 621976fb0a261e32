"""Users per second of `forecart score` beside the forward pass, and with ten times the users.

Method: on the features and the model of a finished project,

    forward   the network's forward pass in training mode, gradients recorded, over the packed
              batches of everybody at the end of the data, made beforehand and held in memory
    score     `pipelines.scoring.score` in a process of its own: digests of model and data, columns
              read, cut, packed, forward, calibration, Parquet written
    tenfold   the same on a project whose users are those of the first, ten times over

Seconds are whole processes' but for the import of the libraries; memory is the process's largest
resident set, which counts mapped pages of the columns as long as the machine has room for them.
"Anonymous" is what the process itself holds, sampled every 20 ms.

    python benchmarks/scoring.py [--root .] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.events import to_us
from pipelines.features.store import Sequences

TIMES = 10


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(score_here(given.root)))
        return
    with tempfile.TemporaryDirectory(prefix="forecart-scoring-") as temporary:
        one, ten = Path(temporary) / "one", Path(temporary) / "ten"
        multiply(given.root, one, 1)
        multiply(given.root, ten, TIMES)
        found: dict[str, list[Any]] = {"forward": [], "score": [], "tenfold": []}
        # Interleaved, so that a busy minute of the machine falls on all of them.
        for _ in range(given.repeats):
            found["forward"].append(time_forward(one))
            found["score"].append(run_child(one))
            found["tenfold"].append(run_child(ten))
    middle = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    rate = {name: values["users"] / values["seconds"] for name, values in middle.items()}
    print(
        json.dumps(
            middle
            | {
                "users_per_second": {name: round(value) for name, value in rate.items()},
                "score_to_forward": round(rate["score"] / rate["forward"], 3),
                "tenfold_to_forward": round(rate["tenfold"] / rate["forward"], 3),
                "tenfold_seconds_ratio": round(
                    middle["tenfold"]["seconds"] / middle["score"]["seconds"], 2
                ),
            },
            indent=2,
        )
    )


def multiply(source: Path, target: Path, times: int) -> None:
    """Make a project whose users are those of another so many times over."""
    features = target / "data/features"
    (features / "sequences").mkdir(parents=True)
    shutil.copytree(source / "models/gpt", target / "models/gpt")
    for name in ("cuts.json", "schema.json"):
        shutil.copy(source / "data/features" / name, features / name)
    everyone = Sequences.load(source / "data/features/sequences")
    everyone.take(np.tile(np.arange(everyone.users), times)).save(features / "sequences")
    people = pq.read_table(source / "data/features/users.parquet")
    pq.write_table(pa.concat_tables([people] * times), features / "users.parquet")


def run_child(root: Path) -> dict[str, float]:
    """Score a project anew in a process of its own."""
    shutil.rmtree(root / "data/scores", ignore_errors=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--root", str(root)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(answer)
    return found


def score_here(root: Path) -> dict[str, float]:
    """Score a project and measure this process."""
    import torch  # noqa: F401 - its import is not scoring

    from pipelines.scoring import Which, score

    process, peak, ended = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            memory = process.memory_info()
            peak[0] = max(peak[0], memory.rss - memory.shared)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    score(root, which=Which.CANDIDATE)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    users = len(np.load(root / "data/features/sequences/offsets.npy")) - 1
    return {"users": users, "seconds": seconds, "anonymous_mib": peak[0] / 2**20}


def time_forward(root: Path) -> dict[str, float]:
    """Time the forward pass of training over everybody's packed histories."""
    from pipelines.model.batches import cut_pieces, iterate
    from pipelines.model.predictor import _TOKENS_PER_BATCH, Predictor
    from pipelines.model.timeline import Timeline

    predictor = Predictor.load(root / "models/gpt")
    sequences = Sequences.load(root / "data/features/sequences")
    timeline = Timeline(sequences)
    users = np.arange(sequences.users, dtype=np.int64)
    cuts = json.loads((root / "data/features/cuts.json").read_text())
    now = to_us(datetime.fromisoformat(cuts["end_ts"]))
    config = predictor.spec.network
    pieces = cut_pieces(
        timeline,
        timeline.cuts(users, np.full(len(users), now, dtype=np.int64)),
        context=predictor.spec.context,
        stride=1,
        shift=None,
    )
    batches = list(
        iterate(
            timeline,
            predictor.tokenizer,
            pieces,
            row=min(predictor.spec.context + 2, int(pieces.lengths.max(initial=2))),
            tokens_per_batch=_TOKENS_PER_BATCH,
            features=config.features > 0,
            rng=None,
        )
    )
    predictor.network.train()
    started = time.perf_counter()
    for collated in batches:
        predictor.network(collated.batch)
    return {"users": sequences.users, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
