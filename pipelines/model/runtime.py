"""What a training runs on: seeds, threads, precision, compilation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from pipelines.config import Train
from pipelines.model.backbones import Block, Transformer, draw_kept
from pipelines.model.network import Network
from pipelines.model.predictor import choose_device

_GPU_LOADERS: Final = 4


def seed_everything(config: Train) -> None:
    """Make what follows repeatable: seeds, the number of threads, deterministic kernels.

    Sums split over another number of threads round differently, so that it is a setting and not the
    machine's own. On a GPU what is outside the backbone multiplies in TensorFloat-32 where the
    backbone does in bfloat16.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if choose_device(config.device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        half = choose_precision(config) is torch.bfloat16
        torch.set_float32_matmul_precision("high" if half else "highest")
    # Every buffer here is written before it is read; filling them first costs a tenth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Moments of rarely met embeddings fade into denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)


@contextmanager
def refuse_chance(network: Network) -> Iterator[None]:
    """On a GPU, take attention's repeatable kernels: PyTorch does where others are refused.

    Sums along a recurrence or a mean have none there, so that those backbones stay as they are.
    """
    cuda = next(network.parameters()).device.type == "cuda"
    refuse = cuda and isinstance(network.backbone, Transformer)
    torch.use_deterministic_algorithms(True, warn_only=not refuse)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def count_workers(config: Train) -> int:
    """Return how many batches may be predicted side by side, each by ``config.threads`` threads."""
    if choose_device(config.device).type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // config.threads)


def count_loaders(device: torch.device) -> int:
    """Return how many threads make steps: a GPU takes more than one makes."""
    return 1 if device.type == "cpu" else max(1, min(_GPU_LOADERS, (os.cpu_count() or 1) - 1))


def choose_precision(config: Train) -> torch.dtype:
    """Return what the backbone's products are computed in; ``auto`` leaves the CPU at float32."""
    if config.precision == "auto":
        half = choose_device(config.device).type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def compile_backbone(network: Network, config: Train) -> Callable[..., Any] | None:
    """Return the backbone compiled, None where it is to stay as it is.

    It shares the weights with the network, which stays as it is: names and predictions do not
    depend on it. ``auto`` leaves backbones without attention alone, whose shapes depend on data.
    """
    wanted = config.compile
    if wanted == "auto":
        device = next(network.parameters()).device
        wanted = device.type == "cuda" and isinstance(network.backbone, Transformer)
    if not wanted:
        return None
    for block in network.backbone.modules():
        if isinstance(block, Block):
            # Compiled or not, the same numbers are drawn. A decorator would have every process that
            # predicts import the compiler, which takes more than a second and 70 MiB.
            block.draw = torch.compiler.disable(draw_kept)  # type: ignore[no-untyped-call]
    return torch.compile(network.backbone, dynamic=True)
