"""What runs the network fastest on a processor, alone and beside a busy interpreter.

    python -m benchmarks.inference_engines --model models/gpt [--seconds 3]

Shoppers with 100 events of one request are collated once; then the network, from tokens to the
heads' outputs at NOW, is run again and again on one thread: as it is (eager), traced (torch.jit),
compiled (torch.compile), exported and compiled ahead of time (AOTInductor). All but the first take
fixed shapes. "Beside" is with a thread of the same process that runs Python all the time, as a web
server under load does. Told are medians in milliseconds, seconds to prepare, and the largest
difference of an output to the eager one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.generators import NOW, make_body
from pipelines.features.store import encode_events
from pipelines.model.backbones import Block, Transformer, attention_mask
from pipelines.model.network import Batch, Network, _lay_out
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import Timeline

Run = Callable[[], tuple[Tensor, ...]]
NAMES = tuple(field.name for field in fields(Batch))


class Fixed(nn.Module):
    """The network on a batch of one shape, whose rows hold one shopper each.

    Args:
        network: the model's.
        batch: an example.
    """

    def __init__(self, network: Network, batch: Batch) -> None:
        super().__init__()
        self.network = network
        rows, length = batch.source.shape
        assert torch.equal(batch.now_place // length, torch.arange(rows))
        self.register_buffer("slots", (batch.now_place % length)[:, None])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the hazards and the means of the amounts."""
        batch = Batch(**dict(zip(NAMES, tensors, strict=True)))
        network, backbone = self.network, self.network.backbone
        assert isinstance(backbone, Transformer)
        x, layout = _lay_out(batch, network.embed(batch))
        mask = attention_mask(layout.segment, layout.is_now, causal=backbone.causal)
        turn = backbone.rotary(layout.time, layout.position)
        for block in backbone.blocks[:-1]:
            x = block(x, mask, turn)
        last = backbone.blocks[-1]
        assert isinstance(last, Block)
        said = network.read_now(batch, network.norm(last.at(x, mask, turn, self.slots)[:, 0]))
        return said.hazard, said.amount_mean


def collate(predictor: Predictor, shoppers: int) -> Batch:
    """Return the network's input for some shoppers with 100 events each."""
    users = []
    for seed in range(shoppers):
        (user,) = make_body(100, seed)["users"]
        users.append([{**e, "ts": datetime.fromisoformat(e["ts"])} for e in user["events"]])
    timeline = Timeline(encode_events(users))
    now = int((NOW - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)
    cuts = timeline.cuts(np.arange(shoppers), np.full(shoppers, now))
    (collated,) = predictor._iterate(timeline, cuts, features=True)
    return collated.batch


def make_engines(
    network: Network, batch: Batch, folder: Path
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yield names, and what prepares each."""
    fixed = Fixed(network, batch).eval()
    tensors = tuple(getattr(batch, name) for name in NAMES)

    def traced() -> Run:
        module = torch.jit.freeze(torch.jit.trace(fixed, tensors, check_trace=False))
        return lambda: module(*tensors)

    def compiled() -> Run:
        module = torch.compile(fixed, dynamic=False)
        return lambda: module(*tensors)

    def ahead_of_time() -> Run:
        program = torch.export.export(fixed, tensors)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / f"{len(batch.now_place)}.pt2")
        )
        module = torch._inductor.aoti_load_package(package)
        return lambda: module(*tensors)

    yield "eager", lambda: lambda: fixed(*tensors)
    yield "torch.jit.trace", traced
    yield "torch.compile", compiled
    yield "AOTInductor", ahead_of_time


@contextmanager
def busy() -> Iterator[None]:
    """Run Python in another thread of this process."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(run: Run, seconds: float) -> float:
    """Return the median of a run's milliseconds."""
    times = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return round(float(np.median(times)), 2)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--seconds", type=float, default=3.0, help="of every measurement")
    given = parser.parse_args()
    torch.set_num_threads(1)
    predictor = Predictor.load(given.model, "cpu")
    (network,) = predictor.networks
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder, torch.inference_mode():
        for shoppers in (1, 16):
            batch = collate(predictor, shoppers)
            expected: tuple[Tensor, ...] | None = None
            for name, prepare in make_engines(network, batch, Path(folder)):
                began = time.perf_counter()
                run = prepare()
                told = run()
                ready = time.perf_counter() - began
                expected = expected or told
                entry: dict[str, Any] = {"ready_seconds": round(ready, 1)}
                entry["alone_ms"] = measure(run, given.seconds)
                with busy():
                    entry["beside_ms"] = measure(run, given.seconds)
                gaps = [(a - b).abs().max() for a, b in zip(expected, told, strict=True)]
                entry["difference"] = float(f"{float(max(gaps)):.1e}")
                found.setdefault(name, {})[f"{shoppers} shoppers"] = entry
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
