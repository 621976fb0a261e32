"""The processes that predict, and the model that they hold.

Reading requests and predicting share one interpreter badly: every step of the model hands the lock
of the interpreter over, and gets it back only after the network's code has had its turn (5 ms by
default). So the model lives in processes of its own, one a core, which take a batch at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from msgspec import MsgspecError

from pipelines.errors import UserError
from serving.copies import Copy
from serving.frames import (
    HEAD_BYTES,
    Ready,
    Refused,
    Reply,
    Request,
    Start,
    pack,
    read_length,
    unpack_reply,
)

COUNT_VARIABLE: Final = "FORECART_PREDICTORS"
_MOST_BY_DEFAULT: Final = 4
_MOST: Final = 64

# A batch takes milliseconds; a process that takes so long for one will not come back. Less than the
# service's own limit, which says nothing of why.
_BATCH_SECONDS: Final = 20.0
_START_SECONDS: Final = 120.0
_END_SECONDS: Final = 10.0

# Between two looks whether all are there.
_LOOK_SECONDS: Final = 1.0

# Between two tries to start a process again.
_LEAST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0

# A core each: threads of several would wait for one another. And glibc keeps the memory of a batch
# for the next one, in huge pages where the system has some: to map it afresh costs up to a third of
# the model's time, small pages a twentieth.
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

_SOURCES: Final = Path(__file__).resolve().parents[1]
_LOG: Final = logging.getLogger(__name__)


class Unavailable(Exception):
    """No process that predicts has answered; the call may be sent again."""


def find_count() -> int:
    """Return how many processes predict: FORECART_PREDICTORS, or one for each of up to 4 cores.

    Raises:
        UserError: the variable holds no such number.
    """
    text = os.environ.get(COUNT_VARIABLE)
    if not text:
        return min(len(_find_cores()), _MOST_BY_DEFAULT)
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise UserError(f"{COUNT_VARIABLE}: {text!r} is not a number from 1 to {_MOST}")
    return int(text)


def _find_cores() -> list[int]:
    """Return the cores that this process may use, as far as the system tells them."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return sorted(usable(0))


def assign_cores(count: int) -> list[int | None]:
    """Return the core that each of some processes is to stay on; None = any.

    A process that stays finds in the core's cache what it left there. But only where every core
    has one: many services on one large machine must not all choose the same cores.
    """
    cores = _find_cores()
    return list(cores) if len(cores) == count else [None] * count


class _Process:
    """One process, and the way to ask it; of one caller at a time.

    Attributes:
        core: that it stays on; None = any.
        digest: of the model that it holds.
        since: when it was ready, in seconds.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        core: int | None,
    ) -> None:
        self.core = core
        self._process = process
        self._reader = reader
        self._writer = writer
        self.digest = ""
        self.since = 0.0

    @classmethod
    async def start(cls, start: Start, core: int | None) -> _Process:
        """Start a process and wait until it holds the model.

        Args:
            start: the model.
            core: that it is to stay on; None = any.

        Raises:
            UserError: the model is refused.
            Unavailable: the process ended, or took too long; that says nothing of the model.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [theirs.fileno()] if core is None else [theirs.fileno(), core]
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.predicting", *map(str, arguments)],
                cwd=_SOURCES,
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        made = cls(process, *await asyncio.open_unix_connection(sock=ours), core)
        try:
            async with asyncio.timeout(_START_SECONDS):
                reply = await made.ask(start)
        except BaseException as error:
            await made.end(kill=True)
            if isinstance(error, (OSError, EOFError, TimeoutError, MsgspecError)):
                raise Unavailable(f"the process that was to load {start.model} ended") from None
            raise
        if not isinstance(reply, Ready):
            await made.end()
            problem = reply.problem if isinstance(reply, Refused) else "it is not ready"
            raise UserError(problem)
        made.digest, made.since = reply.digest, time.monotonic()
        return made

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._reader.at_eof()

    async def ask(self, message: Start | Request) -> Reply:
        """Send a message and wait for the answer.

        Raises:
            OSError, EOFError: the process ended.
            MsgspecError: it says what cannot be read.
        """
        self._writer.write(pack(message))
        await self._writer.drain()
        head = await self._reader.readexactly(HEAD_BYTES)
        return unpack_reply(await self._reader.readexactly(read_length(head)))

    async def end(self, *, kill: bool = False) -> None:
        """Let it end, and wait until it has."""
        if kill:
            self._process.kill()
        self._writer.close()
        try:
            await asyncio.to_thread(self._process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


class Engine:
    """Some processes that hold one model.

    Processes that die are replaced, and what they worked on fails. To be used from one event loop.

    Args:
        count: of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.digest = ""
        self._copy: Copy | None = None
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        # All of the model that serves, idle or not.
        self._serving: set[_Process] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a process is there to predict."""
        return any(not process.gone for process in self._serving)

    async def start(self, model: Path, *, digest: str | None = None, check: bool = False) -> str:
        """Serve a model, in place of the one that served before.

        Calls go on meanwhile; the processes of the model before end when they have answered.

        Args:
            model: its folder.
            digest: that its files have to have; None = any.
            check: whether it has to reproduce the golden predictions beside it.

        Returns:
            The digest of its files.

        Raises:
            UserError: the model is refused; the one before goes on.
            Unavailable: a process ended before it could tell.
            OSError: its files cannot be copied.
        """
        copy = await asyncio.to_thread(Copy, model)
        first = Start(model=str(copy.model), digest=digest, check=check)
        starts = [_Process.start(first, core) for core in assign_cores(self.count)]
        started = await asyncio.gather(*starts, return_exceptions=True)
        processes = [process for process in started if isinstance(process, _Process)]
        errors = [error for error in started if isinstance(error, BaseException)]
        if errors:
            await asyncio.gather(*(process.end() for process in processes))
            copy.remove()
            if isinstance(errors[0], UserError):
                raise UserError(copy.name_source(str(errors[0])))
            raise errors[0]
        before, self._copy = self._copy, copy
        self.digest = processes[0].digest
        self._serving = set(processes)
        # Those of the model before that are busy end when they are given back.
        while not self._idle.empty():
            self._end(self._idle.get_nowait())
        for process in processes:
            self._idle.put_nowait(process)
        if self._watch is None:
            self._watch = self._spawn(self._look_after())
        if before is not None:
            before.remove()
        return self.digest

    async def ask(self, request: Request) -> Reply:
        """Have a process answer a request.

        Raises:
            Unavailable: no process is there, or the one that was asked ended.
        """
        process = await self._take()
        try:
            async with asyncio.timeout(_BATCH_SECONDS):
                reply = await process.ask(request)
        except (OSError, EOFError, TimeoutError, MsgspecError) as error:
            _LOG.error("a process that predicts is replaced: %s", type(error).__name__)
            self._lose(process)
            raise Unavailable("predicting was interrupted; send again") from None
        except BaseException:
            # Its next answer would be the one to this request.
            self._lose(process)
            raise
        self._give(process)
        return reply

    async def close(self) -> None:
        """End all processes."""
        processes, self._serving = self._serving, set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in processes))
        if self._copy is not None:
            self._copy.remove()

    async def _take(self) -> _Process:
        while self.ready:
            try:
                async with asyncio.timeout(_BATCH_SECONDS):
                    process = await self._idle.get()
            except TimeoutError:
                break
            if process not in self._serving:
                self._end(process)
            elif process.gone:
                self._lose(process)
            else:
                return process
        raise Unavailable("predictions are not available; send again later")

    def _give(self, process: _Process) -> None:
        if process in self._serving:
            self._idle.put_nowait(process)
        else:
            self._end(process)

    def _lose(self, process: _Process) -> None:
        self._end(process, kill=True)
        if process in self._serving:
            self._serving.discard(process)
            early = time.monotonic() - process.since < _LONGEST_PAUSE
            self._spawn(self._replace(process, _LEAST_PAUSE if early else 0.0))

    def _end(self, process: _Process, *, kill: bool = False) -> None:
        self._spawn(process.end(kill=kill))

    async def _replace(self, lost: _Process, pause: float) -> None:
        """Start a process like one that was lost, as long as its model serves."""
        digest = lost.digest
        while digest == self.digest and self._copy is not None:
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, _LEAST_PAUSE), _LONGEST_PAUSE)
            start = Start(model=str(self._copy.model), digest=digest, check=False)
            try:
                process = await _Process.start(start, lost.core)
            except (UserError, Unavailable) as error:
                _LOG.error("no process that predicts: %s", error)
                continue
            if digest == self.digest:
                self._serving.add(process)
            self._give(process)
            return

    async def _look_after(self) -> None:
        """Notice who has ended while nobody asked: a service that is not ready is asked nothing."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for process in [process for process in self._serving if process.gone]:
                _LOG.error("a process that predicts has ended, and is replaced")
                self._lose(process)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
