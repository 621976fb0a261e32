"""Events per second of pretraining, beside pytorch-lifestream's transformer on the same events.

Method: on the features of a finished run, both learn to tell the next event from those before it,
with 64 channels, 2 layers, 4 heads, a feed-forward layer of 256, histories of at most 128 events,
single precision, the same number of threads, no compilation, weights updated after every batch.
Both run in turns, each in a process of its own; told is the median of the rounds. Counted are real
events only, never padding.

    ours     an epoch of the stage `pretrain` with the network of params.yaml: next type, category
             (item where the data name no categories), gap and amount, of one event in four, and
             the item likewise where the peer tells it, too; from packed batches of 2,048 tokens
    theirs   GptPretrainModule with GptEncoder (Hugging Face's GPT-2) and TrxEncoder, as its
             documentation shows, on GptDataset: a random slice of 16 to 128 events of each shopper
             with as many, padded batches, its NAdam; a plain loop, which spares it the costs of
             Lightning's trainer. Two sets of heads: type and category; and these with the item,
             which is a full softmax as the module has no other. Each batch size of --batch-sizes
             is tried and the fastest told.

The peer lives in an environment of its own, made once under --environment:

    python benchmarks/lifestream_speed.py --environment DIR [--root .] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from pipelines.cli import THREADS

PEER: Final = ("torch==2.13.0", "pytorch-lifestream==0.7.0")
HEADS: Final = {
    "type and category": ("event_type", "category"),
    "type, category and item": ("event_type", "category", "item"),
}
ITEMS: Final = 5000


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of the peer's runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--ours", choices=list(HEADS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ours:
        print(measure_ours(given.root, given.threads, "item" in HEADS[given.ours]))
        return
    python = make_environment(given.environment)
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        export(given.root, Path(folder))
        ours: dict[str, list[float]] = {name: [] for name in HEADS}
        theirs: dict[str, dict[int, list[float]]] = {name: {} for name in HEADS}
        for _ in range(given.rounds):
            for name, columns in HEADS.items():
                own = [sys.executable, __file__, "--ours", name, "--root", str(given.root)]
                own += ["--environment", str(given.environment), "--threads", str(given.threads)]
                # As the command `forecart` sets them; the peer has what its user has: nothing set.
                ours[name].append(run(own, THREADS))
                for size in given.batch_sizes:
                    command = [str(python), str(Path(__file__).with_name("lifestream_peer.py"))]
                    command += [folder, ",".join(columns), str(size), str(given.seconds)]
                    theirs[name].setdefault(size, []).append(run([*command, str(given.threads)]))
    result: dict[str, Any] = {"threads": given.threads}
    for name, by_size in theirs.items():
        medians = {size: statistics.median(values) for size, values in by_size.items()}
        best = max(medians, key=lambda size: medians[size])
        speed = statistics.median(ours[name])
        result[name] = {
            "ours_events_per_s": round(speed),
            "events_per_s": round(medians[best]),
            "batch_size": best,
            "ratio": round(speed / medians[best], 2),
            "ratios": [round(a / b, 2) for a, b in zip(ours[name], by_size[best], strict=True)],
        }
    print(json.dumps(result, indent=2))


def run(command: list[str], variables: Mapping[str, str] = MappingProxyType({})) -> float:
    """Run a process that prints events per second."""
    environment = os.environ | dict(variables)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(result.stdout)


def make_environment(folder: Path) -> Path:
    """Install the peer where it is not yet; return its Python."""
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER], check=True)
    return python


def export(root: Path, folder: Path) -> None:
    """Write what the peer reads: codes from 1 by frequency, gaps in days, prices."""
    source = root / "data/features/sequences"
    for name, written in (("item", "item"), ("category", "category"), ("type", "event_type")):
        column = np.load(source / f"{name}.npy", allow_pickle=False)
        _, code, count = np.unique(column, return_inverse=True, return_counts=True)
        rank = np.empty(len(count), dtype=np.int64)
        rank[np.argsort(-count, kind="stable")] = np.arange(1, len(count) + 1)
        np.save(folder / f"{written}.npy", np.minimum(rank[code], ITEMS))
    ts = np.load(source / "ts.npy", allow_pickle=False)
    offsets = np.load(source / "offsets.npy", allow_pickle=False)
    gap = np.diff(ts, prepend=ts[:1]) / 86_400e6
    gap[offsets[:-1][np.diff(offsets) > 0]] = 0.0
    np.save(folder / "gap.npy", gap.astype(np.float32))
    price = np.load(source / "price.npy", allow_pickle=False)
    np.save(folder / "price.npy", np.nan_to_num(price))
    np.save(folder / "offsets.npy", offsets)


def measure_ours(root: Path, threads: int, items: bool) -> float:
    """Return events per second of an epoch of pretraining, with the next item told or without."""

    from pipelines.config import load_params
    from pipelines.model.fitting import Fit
    from pipelines.model.heads import Heads
    from pipelines.model.runtime import seed_everything
    from pipelines.model.steps import Phase
    from pipelines.model.timeline import Timeline
    from pipelines.stages.train import load_inputs

    params = load_params(root / "params.yaml")
    config = params.train.model_copy(update={"threads": threads})
    if not items:
        config = config.model_copy(update={"item_weight": 0.0})
    sequences, periods, targets, vocabulary = load_inputs(root)
    seed_everything(config)
    heads = Heads.for_targets(targets)
    fit = Fit(Timeline(sequences), periods, heads, targets, config, vocabulary)
    close = periods.calibration
    fit.run(Phase.PRETRAIN, 1, close, params.pretrain.learning_rate, lambda _: None)
    return fit.events / fit.seconds


if __name__ == "__main__":
    main()
