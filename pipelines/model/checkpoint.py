"""Where a training stands, so that a killed one goes on: one safetensors file, no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class Checkpoint:
    """A file that holds the last finished epoch of one training.

    Args:
        path: the file; its folder is made.
        key: digest of all that the training depends on. A file of another key is not used.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def part(self, number: int) -> Checkpoint:
        """Return the place of one of several trainings that make one model."""
        name = f"{self.path.stem}-{number}{self.path.suffix}"
        return Checkpoint(self.path.with_name(name), f"{self.key}-{number}")

    def write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the file: whoever dies while writing leaves the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"key": self.key, "state": json.dumps(state)}
        beside = self.path.with_suffix(".part")
        with beside.open("wb") as out:
            out.write(save(held, metadata=metadata))
            out.flush()
            os.fsync(out.fileno())
        beside.replace(self.path)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was written under this key; None when there is nothing of it."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None
        return tensors, json.loads(metadata["state"])

    def remove(self) -> None:
        """Forget the training, its parts too; called when its result is in place."""
        for path in [self.path, *self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}")]:
            path.unlink(missing_ok=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's tensors by name; settings are not held."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of ``pack_optimizer`` back."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = tensor
    whole["state"] = state
    optimizer.load_state_dict(whole)


def pack_torch_chance(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's generators: the CPU's, and of a GPU its own."""
    states = {"chance": torch.get_rng_state()}
    if device.type == "cuda":
        states["chance.cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_torch_chance(device: torch.device, tensors: dict[str, Tensor]) -> None:
    """Put the states of ``pack_torch_chance`` back; older checkpoints hold the CPU's alone."""
    torch.set_rng_state(tensors["chance"])
    if device.type == "cuda" and "chance.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["chance.cuda"], device)
