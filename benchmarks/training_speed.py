"""Events per second of a training epoch, beside the same model on batches prepared in memory.

Method: on the features of a finished run, with the network of params.yaml:

    epoch      a whole epoch as training runs it: cuts drawn, histories cut and packed, labels,
               forward, backward, optimiser
    prepared   the steps of that very epoch, all of them held in memory (of the GPU, where there
               is one) with all that is told of them: what the input pipeline costs is the ratio
    one batch  the same step over and over on the first of them, which stays in the caches
    pipeline   an epoch's batches made by one thread, and nothing done with them
    MFU        operations of the model by second (see pipelines.model.speed) over the most that the
               device can do: on the CPU a measured matrix product, of a GPU the data sheet's

One after the other in every repeat, as the speed of shared machines changes from minute to
minute; medians of the repeats, also of the ratios. On a GPU, or compiled, one epoch goes before.
Settings of `train` may be given another value: --set width=512 --set layers=8.

Threads wait as the command `forecart` lets them wait:

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=3000 \\
        python benchmarks/training_speed.py [--root .] [--repeats 3] [--set threads=2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipelines.config import Train, load_params
from pipelines.model.fitting import Fit, make_optimizer
from pipelines.model.heads import Heads
from pipelines.model.network import to_device
from pipelines.model.runtime import seed_everything
from pipelines.model.speed import find_peak
from pipelines.model.steps import Phase, Step
from pipelines.model.timeline import Timeline
from pipelines.stages.train import load_inputs, measure_memory


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--params", type=Path, help="params.yaml; that of the root if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    config = load_params(given.params or given.root / "params.yaml").train
    changed = dict(pair.split("=", 1) for pair in given.set)
    config = Train(**config.model_dump() | {k: yaml.safe_load(v) for k, v in changed.items()})
    print(json.dumps(measure(given.root, config, given.repeats), indent=2))


def measure(root: Path, config: Train, repeats: int) -> dict[str, Any]:
    """Measure a network on the features of a root."""
    sequences, periods, targets, vocabulary = load_inputs(root)
    seed_everything(config)
    heads = Heads.for_targets(targets)
    fit = Fit(Timeline(sequences), periods, heads, targets, config, vocabulary)
    close = periods.calibration
    fit.start(close, {})
    peak = find_peak(fit.device, fit.precision, config.threads)
    if fit.device.type == "cuda" or fit.backbone is not None:
        run_epoch(fit, close)
    epochs: list[tuple[float, float]] = []
    prepared: list[float] = []
    one_batch: list[float] = []
    for _ in range(repeats):
        chance = np.random.default_rng()
        chance.bit_generator.state = fit.rng.bit_generator.state
        epochs.append(run_epoch(fit, close))
        steps = hold_epoch(fit, close, chance)
        prepared.append(repeat_steps(fit, steps))
        one_batch.append(repeat_steps(fit, steps[:1] * len(steps)))
    events, flops = zip(*epochs, strict=True)
    cuda = fit.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "precision": str(fit.precision).removeprefix("torch."),
        "compiled": fit.backbone is not None,
        "weights": sum(p.numel() for p in fit.network.parameters()),
        "events_per_s": round(statistics.median(events)),
        "prepared_events_per_s": round(statistics.median(prepared)),
        "one_batch_events_per_s": round(statistics.median(one_batch)),
        "ratio": compare(events, prepared),
        "ratios": [round(a / b, 3) for a, b in zip(events, prepared, strict=True)],
        "ratio_to_one_batch": compare(events, one_batch),
        "pipeline_events_per_s": round(make_epoch(fit, close)),
        "tflops": round(statistics.median(flops) / 1e12, 4),
        "mfu": None if peak is None else round(statistics.median(flops) / peak, 3),
        **{name: round(value) for name, value in measure_memory(fit.device).items()},
    }


def run_epoch(fit: Fit, close: int) -> tuple[float, float]:
    """Return events and floating-point operations per second of an epoch."""
    fit.done = dict.fromkeys(Phase, 0)
    fit.run(Phase.FIT, 1, close, fit.schedule.learning_rate, lambda _: None)
    told = fit.history[-1]
    return told["events_per_s"], told["flops_per_s"]


def compare(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median of the ratios of what was measured side by side."""
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)


def hold_epoch(fit: Fit, close: int, chance: np.random.Generator) -> list[Step]:
    """Return all steps of an epoch, in the device's memory."""
    drawn = fit.loader.epoch(close, Phase.FIT, chance)
    return [to_device(step, fit.device) for step in fit.loader.steps(drawn)]


def repeat_steps(fit: Fit, steps: Sequence[Step]) -> float:
    """Return events per second of prepared steps, which change no weight."""
    optimizer = make_optimizer(fit.network, 0.0, 0.0)
    fit.network.train()
    for step in steps[:3]:
        fit._train_step([step], optimizer, Phase.FIT, step.cuts)
    _wait(fit.device)
    began = time.perf_counter()
    for step in steps:
        fit._train_step([step], optimizer, Phase.FIT, step.cuts)
    _wait(fit.device)
    return sum(step.events for step in steps) / (time.perf_counter() - began)


def make_epoch(fit: Fit, close: int) -> float:
    """Return events per second of batches that one thread makes."""
    began = time.perf_counter()
    drawn = fit.loader.epoch(close, Phase.FIT, np.random.default_rng(0))
    events = sum(step.events for step in fit.loader.steps(drawn))
    return events / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
