"""Events per second of a training epoch, beside the same model on one batch prepared in memory.

Method: on the features of a finished run, with the network of params.yaml:

    epoch      a whole epoch as training runs it: cuts drawn, histories cut and packed, labels,
               forward, backward, optimiser
    prepared   the same step over and over on one batch that is held in memory, labels included:
               what the input pipeline costs is the ratio of the two
    floor      matrix products alone: floating-point operations of a step (6 per weight of the
               linear layers and token, plus attention) over the rate that a large single-precision
               matrix product reaches on this machine, that is, the model's utilisation (MFU)

With --compile the prepared batch is told of a compiled backbone (`torch.compile`); the epochs stay
eager. Each figure is the median of the repeats.

Threads wait as the command `forecart` lets them wait:

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=3000 \\
        python benchmarks/training_speed.py [--root .] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.config import load_params
from pipelines.model.heads import Heads
from pipelines.model.timeline import Timeline
from pipelines.model.training import Phase, _Fit, _make_optimizer, seed_everything
from pipelines.stages.train import load_inputs


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    config = load_params(given.root / "params.yaml").train
    sizes = {"width": given.width, "layers": given.layers, "threads": given.threads}
    config = config.model_copy(update={k: v for k, v in sizes.items() if v})
    sequences, periods, targets, vocabulary = load_inputs(given.root)
    seed_everything(config.seed, config.threads)
    heads = Heads.for_targets(targets)
    fit = _Fit(Timeline(sequences), periods, heads, targets, config, vocabulary)
    close = periods.calibration
    fit.start(close, {})
    epoch: list[float] = []
    prepared: list[float] = []
    flops = 0.0
    for _ in range(given.repeats):
        before, seconds = fit.events, fit.seconds
        fit.done = dict.fromkeys(Phase, 0)
        fit.run(Phase.FIT, 1, close, config.learning_rate, lambda _: None)
        epoch.append((fit.events - before) / (fit.seconds - seconds))
        speed, flops = repeat_batch(fit, close, compiled=given.compile)
        prepared.append(speed)
    peak = find_peak()
    result: dict[str, Any] = {
        "device": str(fit.device),
        "cores": os.cpu_count(),
        "weights": sum(p.numel() for p in fit.network.parameters()),
        "events_per_s": round(statistics.median(epoch)),
        "prepared_events_per_s": round(statistics.median(prepared)),
        "ratio": round(statistics.median(epoch) / statistics.median(prepared), 3),
        "peak_gflops": round(peak / 1e9, 1),
        "mfu": round(flops * statistics.median(epoch) / peak, 3),
    }
    print(json.dumps(result, indent=2))


def repeat_batch(
    fit: _Fit, close: int, *, compiled: bool, seconds: float = 5.0
) -> tuple[float, float]:
    """Return events/s on one batch, and floating-point operations per event."""
    _, batches = fit._batches(close, Phase.FIT)
    collated = next(iter(batches))
    optimizer = _make_optimizer(fit.network, 1e-6, 0.0)
    labels = fit._labels(collated.cuts, close)
    remembered, fit._labels = fit._labels, lambda cuts, close: labels  # type: ignore[method-assign]
    eager = fit.network.backbone
    if compiled:
        fit.network.backbone = torch.compile(eager)  # type: ignore[assignment]
    fit.network.train()
    for _ in range(3):
        fit._train_step(collated, close, optimizer, Phase.FIT)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        fit._train_step(collated, close, optimizer, Phase.FIT)
        steps += 1
    if fit.device.type == "cuda":
        torch.cuda.synchronize()
    speed = steps * len(collated.events) / (time.perf_counter() - began)
    fit._labels = remembered  # type: ignore[method-assign]
    fit.network.backbone = eager
    return speed, count_operations(fit, collated.batch.source.shape) / len(collated.events)


def count_operations(fit: _Fit, shape: torch.Size) -> float:
    """Floating-point operations of one training step on (B, L) places."""
    rows, places = shape
    linear = sum(
        module.weight.numel()
        for module in fit.network.backbone.modules()
        if isinstance(module, nn.Linear)
    )
    attention = 2 * 2 * places * fit.config.width * fit.config.layers
    return 3.0 * rows * places * (2 * linear + attention)


def find_peak(size: int = 2048, repeats: int = 8) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.randn(size, size, device=device)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
