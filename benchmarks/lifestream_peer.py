"""The peer's side of lifestream_speed.py, which runs it in the peer's environment.

python lifestream_peer.py FOLDER HEAD,HEAD BATCH_SIZE SECONDS THREADS
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from ptls.frames.gpt import GptDataset, GptPretrainModule
from ptls.nn import TrxEncoder
from ptls.nn.seq_encoder.gpt_encoder import GptEncoder

WIDTH, LAYERS, HEADS, LENGTH, FIRST = 64, 2, 4, 128, 16
WARM = 10  # steps that do not count


def main() -> None:
    """Print real events per second of training."""
    folder, columns, size, seconds, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(1)
    data = load(Path(folder), columns.split(","))
    dataset = GptDataset(data, min_len=FIRST, max_len=LENGTH)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=int(size), shuffle=True, collate_fn=dataset.collate_fn
    )
    sizes = {name: int(max(row[name].max() for row in data)) + 1 for name in columns.split(",")}
    encoder = TrxEncoder(
        embeddings={name: {"in": n, "out": WIDTH // 2} for name, n in sizes.items()},
        numeric_values={"gap": "log", "price": "log"},
        linear_projection_size=WIDTH,
    )
    # No random start of positions beyond what fits: 256 places for 128 events.
    body = GptEncoder(
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=4 * WIDTH, n_positions=2 * LENGTH
    )
    module = GptPretrainModule(encoder, body, total_steps=100_000, seed_seq_len=0)
    (optimizer,), _ = module.configure_optimizers()
    module.train()
    print(measure(module, optimizer, loader, float(seconds)))


def load(folder: Path, columns: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return one dictionary a shopper with enough events."""
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    arrays = {
        name: torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
        for name in (*columns, "gap", "price")
    }
    return [
        {name: array[start:stop] for name, array in arrays.items()}
        for start, stop in itertools.pairwise(offsets)
        if stop - start > FIRST
    ]


def measure(
    module: GptPretrainModule,
    optimizer: torch.optim.Optimizer,
    loader: torch.utils.data.DataLoader,
    seconds: float,
) -> float:
    """Train for some seconds; return real events per second."""
    steps, events, began = 0, 0, time.perf_counter()
    while True:
        for batch in loader:
            loss = module.training_step(batch, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if steps <= WARM:
                events, began = 0, time.perf_counter()
                continue
            events += int(batch.seq_lens.sum())
            if time.perf_counter() - began > seconds:
                return events / (time.perf_counter() - began)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that no Lightning trainer is there
    main()
