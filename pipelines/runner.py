"""Runs the whole graph on this machine, stages that do not wait for each other side by side.

DVC runs one stage after the other; its locks allow several of its processes in one project. So the
graph is taken apart where everything waits for one stage, and what lies between runs in as many
processes as there are chains that do not meet.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Final

from pipelines.errors import UserError
from pipelines.graph import Graph, load_graph
from pipelines.processes import command_environment, mend_lock

GRAPH: Final = Path("dvc.yaml")
# What measures how long something takes is disturbed by whatever runs beside it.
_ALONE: Final = frozenset({"package"})
# All but the longest chain yield to it: what is left at its end would run alone.
_NICENESS: Final = 10

# What DVC says of a stage that has finished and is to run each time.
_ALWAYS: Final = ["always changed"]

_PATIENCE: Final = 0.2  # seconds until what DVC started meanwhile is ended, too
# Seconds for a stage to end by itself after Ctrl-C. A shell whose command took the interrupt and
# ended well goes on with its next one.
_GRACE: Final = 5.0

Chain = tuple[str, ...]


def split(graph: Graph, alone: frozenset[str] = _ALONE) -> list[list[Chain]]:
    """Take the graph apart.

    Args:
        graph: the stages.
        alone: stages beside which nothing is to run.

    Returns:
        Blocks, one after the other; of each the chains that may run side by side, the longest one
        first. Every stage is in one chain, after all that it depends on.
    """
    above: dict[str, set[str]] = {}
    for name in graph.stages:
        ups = graph.upstream[name]
        above[name] = set(ups).union(*(above[up] for up in ups))

    def has_company(name: str) -> bool:
        return name not in alone and any(
            other not in alone
            and other != name
            and other not in above[name]
            and name not in above[other]
            for other in graph.stages
        )

    blocks = groupby(graph.stages, key=has_company)
    return [_find_chains(tuple(b), graph) if together else [tuple(b)] for together, b in blocks]


def _find_chains(block: Sequence[str], graph: Graph) -> list[Chain]:
    """Return the parts of a block between which no edge leads."""
    chains: list[list[str]] = []
    for name in block:
        met = [chain for chain in chains if set(chain) & set(graph.upstream[name])]
        chains = [chain for chain in chains if chain not in met]
        # In the order of the block, in which all follow what they depend on.
        joined = {name}.union(*met)
        chains.append([stage for stage in block if stage in joined])
    return sorted(map(tuple, chains), key=len, reverse=True)


def run(root: Path) -> None:
    """Bring everything up to date, as ``dvc repro`` does.

    Args:
        root: of the project.

    Raises:
        UserError: dvc.yaml is missing or damaged, or a stage failed; the others of its block were
            gone on with, and DVC knows what they made.
    """
    mend_lock(root)
    with _leave_on_sigterm():
        for block in split(load_graph(root / GRAPH)):
            _run_block(root, block)


@contextmanager
def _leave_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that what it started ends, too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_block(root: Path, chains: Sequence[Chain]) -> None:
    running: list[subprocess.Popen[bytes]] = []
    # Whoever calls .venv/bin/forecart by its path need not have it on PATH, where stages look.
    environment = command_environment()
    try:
        for place, chain in enumerate(chains):
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item"]
            quiet = {}
            if place:
                command = ["nice", "-n", str(_NICENESS), *command]
                # One progress bar at a time can be read.
                quiet = {"TQDM_DISABLE": "1"}
            process = subprocess.Popen([*command, *chain], cwd=root, env=environment | quiet)
            running.append(process)
        codes = [process.wait() for process in running]
    except BaseException as error:
        # Ctrl-C reaches them, too; what else ends this process is to end them.
        if isinstance(error, KeyboardInterrupt):
            _wait(running, _GRACE)
        _terminate(running)
        raise
    broken = [chain for chain, code in zip(chains, codes, strict=True) if code]
    if broken:
        failed = [" ".join(_list_left(root, chain)) for chain in broken]
        raise UserError(f"not done: {', '.join(failed)}; see above")


def _list_left(root: Path, chain: Chain) -> Chain:
    """Return the stages of a chain from the first one on that DVC does not know as finished."""
    done = _ask_done(root, chain)
    if done is None:
        # Of what another run holds DVC tells nothing, nor of what is asked with it.
        for place, stage in enumerate(chain):
            if _ask_done(root, (stage,)) != [True]:
                return chain[place:]
    elif not all(done):
        return chain[done.index(False) :]
    return chain


def _ask_done(root: Path, stages: Chain) -> list[bool] | None:
    """Ask DVC which stages it knows as finished; None where it does not tell."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    asked = subprocess.run(
        command, cwd=root, env=command_environment(), capture_output=True, text=True, check=False
    )
    with suppress(ValueError):
        status = json.loads(asked.stdout)
        # Some stages run whatever has changed.
        return [status.get(stage, _ALWAYS) == _ALWAYS for stage in stages]
    return None


def _wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all have ended, at most so long."""
    until = time.monotonic() + seconds
    with suppress(subprocess.TimeoutExpired):
        for process in running:
            process.wait(max(until - time.monotonic(), 0))


def _terminate(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what DVC's processes started until they end themselves, with their locks in order."""
    import psutil

    while left := [process for process in running if process.poll() is None]:
        for process in left:
            with suppress(psutil.Error):
                for stage in psutil.Process(process.pid).children(recursive=True):
                    stage.terminate()
        with suppress(subprocess.TimeoutExpired):
            left[0].wait(_PATIENCE)
