"""Processes that share the steps of one training, as torchrun starts them.

Each draws the same epochs, makes and differentiates its own batches of every step, and all take
the step by the sum of their gradients: data-parallel training by a synchronous all-reduce (Goyal
et al. 2017). A step's batches are those of ``train.accumulate``, however many processes share them,
so that their number is a matter of speed and not of what is learnt. The first process leads: it
alone grows trees, calibrates and writes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Final, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipelines.config import Train
from pipelines.errors import UserError
from pipelines.model.predictor import choose_device

T = TypeVar("T")

_RANK, _COUNT, _LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"  # as torchrun says them
# Schedulers of clusters set those above for jobs of one process, too; this one is torchrun's alone.
_LAUNCHED: Final = "TORCHELASTIC_RUN_ID"
_LOST: Final = 3  # exit code of who lost the others
_ELASTIC: Final = "torch.distributed.elastic"
_SILENCE: Final = 2.0  # seconds that the leader has to tell why
# Growing trees may take longer than PyTorch waits for the others by itself. That one is gone, its
# closed connection tells.
_PATIENCE: Final = timedelta(days=7)
_SET_DEATH_SIGNAL: Final = 1  # of prctl, in <sys/prctl.h>


class PeerLostError(Exception):
    """Another process of the training has ended; that one, or who started it, tells why."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes of a training, and which of them this one is.

    Attributes:
        rank: of this process; 0 leads.
        count: of processes; with one, nothing is passed on.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Is this the process that starts, grows trees, calibrates and writes?"""
        return self.rank == 0

    def own(self, batches: Sequence[T]) -> Sequence[T]:
        """Return this process's share of a step's batches: every ``count``-th of them."""
        return batches[self.rank :: self.count]

    def meet(self) -> None:
        """Wait until all are here."""
        self.add(torch.zeros(1))

    def add(self, values: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor, which all have of one shape."""
        if self.count == 1:
            return values
        total = values.clone()
        with _tell_loss():
            distributed.all_reduce(total)
        return total

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums; what no process has a gradient of keeps none."""
        if self.count == 1:
            return
        listed = list(parameters)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in listed]
        known = torch.tensor([float(p.grad is not None) for p in listed], device=parts[0].device)
        flat = self.add(torch.cat([known, *[part.flatten() for part in parts]]))
        known, *sums = torch.split(flat, [len(listed), *[part.numel() for part in parts]])
        for parameter, some, total in zip(listed, known.tolist(), sums, strict=True):
            parameter.grad = total.view_as(parameter) if some else None

    def share(self, content: bytes) -> bytes:
        """Return to all what the leader gives; what others give does not count."""
        if self.count == 1:
            return content
        size = torch.tensor([len(content)])
        with _tell_loss():
            distributed.broadcast(size, 0)
            held = bytearray(content) if self.leads else bytearray(int(size))
            if held:
                distributed.broadcast(torch.frombuffer(held, dtype=torch.uint8), 0)
        return bytes(held)

    def agree(self, digest: int) -> None:
        """Stop unless all are about the same: they would wait for each other, or learn nonsense.

        Args:
            digest: of what was drawn and of the settings, below 2 to the 62nd.

        Raises:
            UserError: the leader's.
            PeerLostError: the others', who leave the telling to it.
        """
        if self.count == 1:
            return
        ends = torch.tensor([digest, -digest])
        with _tell_loss():
            distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        if int(ends[0]) == -int(ends[1]):
            return
        if not self.leads:
            raise PeerLostError
        raise UserError(
            "train: the processes that share the training differ in their batches or settings; all "
            "machines need the same data/features, the same params.yaml and the same versions of "
            "what is installed"
        )


ALONE: Final = Peers()


@contextmanager
def join_peers(config: Train) -> Iterator[Peers]:
    """Meet the processes that torchrun started beside this one; alone where it did not.

    A process that loses the others leaves by an exit code of its own: whoever ended first has told
    why, or the launcher tells who that was.

    Raises:
        UserError: the batches of a step, or the GPUs, are not enough for so many.
    """
    if not is_launched():
        yield ALONE
        return
    peers = Peers(rank=int(os.environ[_RANK]), count=int(os.environ[_COUNT]))
    _die_with_parent()
    if choose_device(config.device).type == "cuda":
        _take_gpu(int(os.environ.get(_LOCAL, "0")))
    try:
        if peers.count > 1:
            with _tell_loss():
                distributed.init_process_group(timeout=_PATIENCE)
        if peers.leads and config.accumulate % peers.count:
            raise UserError(
                f"train.accumulate: {config.accumulate} batches make a step, which {peers.count} "
                f"processes do not share evenly; set it to a multiple of {peers.count}"
            )
        yield peers
    except PeerLostError as error:
        if peers.leads:
            print(f"forecart: lost the other processes of the training: {error}", file=sys.stderr)
        else:
            # Once one has ended the launcher ends them all, and with them who was about to tell.
            time.sleep(_SILENCE)
        sys.exit(_LOST)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def is_launched() -> bool:
    """Did torchrun, or ``launch``, start this process?"""
    return _LAUNCHED in os.environ


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in so many processes of this machine that find each other.

    They die with this one. What they print is printed.

    Args:
        command: program and arguments.
        count: of processes.

    Returns:
        The exit code: 0, or that of the process which ended first.

    Raises:
        UserError: a process was ended by a signal, and so could not tell itself.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in [name for name in logging.root.manager.loggerDict if name.startswith(_ELASTIC)]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # they tell what is told here
    program, *arguments = command
    # By itself PyTorch leaves its folder of logs behind, empty ones here, with each run.
    with TemporaryDirectory(prefix="forecart-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="forecart",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, program)(*arguments)
        except SignalException as error:
            if error.sigval is signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            told = [code for code in codes if code > 0 and code != _LOST]
            if told:
                return told[0]
            rank, first = error.get_first_failure()
            if first.exitcode < 0:
                name = signal.Signals(-first.exitcode).name
                raise UserError(
                    f"process {rank} of {count} was ended by {name}; run it again: a training goes"
                    " on from its last finished epoch"
                ) from None
            return int(first.exitcode)
    return 0


def _take_gpu(number: int) -> None:
    found = torch.cuda.device_count()
    if number >= found:
        raise UserError(f"train.processes: each wants a GPU of its own, and there are {found}")
    torch.cuda.set_device(number)


def _die_with_parent() -> None:
    """Have this process killed when who started it is gone: nobody else would end it (on Linux)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


@contextmanager
def _tell_loss() -> Iterator[None]:
    """Tell a lost connection from a defect: in these calls PyTorch raises the same for both."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error
