"""How fast training is against what the machine could do: model FLOPs utilisation (MFU).

The model's floating-point operations are counted as in Chowdhery et al. 2022, "PaLM", appendix B:
a token costs 6 operations for every weight of the matrices that it goes through (2 forward, 4
backward), and 12 x layers x width x (length of its history) in attention. Padding, embedding
tables, norms and what is computed twice do not count. MFU is that by second over the machine's
peak.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipelines.model.backbones import Compacted, Transformer
from pipelines.model.network import Batch, Network

_PRODUCT: Final = 512  # rows and columns of the matrices by which a CPU is measured
_SECONDS: Final = 0.05

# Of modules that are there: counting takes a hundredth of a small network's step.
_COUNTED: Final[WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()

# Dense peaks of NVIDIA's data sheets in TFLOPS, without sparsity, by device name: bfloat16 on
# tensor cores, TF32 on tensor cores, float32. None = not on its tensor cores.
_PEAKS: Final[dict[str, tuple[float | None, float | None, float]]] = {
    r"NVIDIA H200": (989.0, 494.7, 66.9),
    r"NVIDIA H100 80GB HBM3": (989.0, 494.7, 66.9),
    r"NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    r"NVIDIA A100-(SXM|PCIE).*": (312.0, 156.0, 19.5),
    r"NVIDIA L40S": (362.0, 183.0, 91.6),
    r"NVIDIA L4": (121.0, 60.0, 30.3),
    r"NVIDIA A10": (125.0, 62.5, 31.2),
    r"Tesla T4": (None, None, 8.1),
}


def count_flops(network: Network, batch: Batch, *, told: float, items: float, read: bool) -> float:
    """Return the floating-point operations of one training step, forward and backward.

    Args:
        network: what is trained.
        batch: what goes through it.
        told: how many next events are told.
        items: how many next items are told.
        read: whether the heads are read at NOW tokens.
    """
    profiles, events, nows = (
        len(part) for part in (batch.profile_codes, batch.event_codes, batch.now_place)
    )
    used = float(profiles * _weights(network.profile_numbers))
    used += events * _weights(network.event_numbers)
    used += nows * _weights(network.now_numbers) + told * _weights(network.next)
    backbone = network.backbone
    if isinstance(backbone, Compacted):
        used += (profiles + events) * _weights(backbone.mixer) + nows * _weights(backbone.now)
    else:
        used += (profiles + events + nows) * _weights(backbone)
    if read:
        heads: list[nn.Module] = [network.join, network.hazard, network.amount]
        heads += [network.fusion] if network.config.features else []
        used += nows * sum(_weights(head) for head in heads)
    if network.items is not None:
        used += items * _weights(network.items)
    flops = 6.0 * used
    if isinstance(backbone, Transformer):
        lengths = torch.bincount(batch.segment.flatten())[1:].double()
        pairs = float(lengths.square().sum())
        flops += 12.0 * len(backbone.blocks) * network.config.width * pairs
    return flops


def _weights(module: nn.Module) -> int:
    """Return how many weights the matrices of a module have."""
    if module not in _COUNTED:
        _COUNTED[module] = _count_weights(module)
    return _COUNTED[module]


def _count_weights(module: nn.Module) -> int:
    return sum(
        parameter.numel()
        for part in module.modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.LSTM)
        for parameter in part.parameters(recurse=False)
        if parameter.ndim >= 2
    )


def find_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float | None:
    """Return the operations per second that a device can do at most.

    Args:
        device: a GPU is looked up; on the CPU a matrix product is measured.
        dtype: of the products.
        threads: of the CPU.

    Returns:
        None of a device that is not known.
    """
    if device.type == "cuda":
        return look_up_peak(torch.cuda.get_device_name(device), dtype)
    return measure_peak(dtype, threads) if device.type == "cpu" else None


def look_up_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return a GPU's dense peak by its name; None where it is not known."""
    for pattern, (half, tensor, full) in _PEAKS.items():
        if re.fullmatch(pattern, name) and "MIG" not in name:
            if dtype == torch.bfloat16:
                peak = half
            else:
                peak = full if torch.get_float32_matmul_precision() == "highest" else tensor
            return None if peak is None else peak * 1e12
    return None


def measure_peak(dtype: torch.dtype, threads: int) -> float:
    """Return the rate of the fastest of some matrix products on the CPU."""
    with _threads(threads), torch.inference_mode():
        a = torch.ones(_PRODUCT, _PRODUCT, dtype=dtype)
        out: Tensor = torch.mm(a, a)
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < _SECONDS:
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            best = min(best, time.perf_counter() - start)
    return 2.0 * _PRODUCT**3 / best


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let operations use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
