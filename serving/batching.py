"""Batches concurrent calls, and waits for more only where that pays.

While batches run, calls queue up; the next batch takes what is there, but no more than its share of
all that is open: of a long batch and a short one beside it the long one's callers wait, and the
short one costs little less. Under no load a call runs at once and alone, under load batches grow by
themselves.

One wait there is. The callers of a batch get their answers together, and those that send again do
so one after the other: the first of them would run alone and keep the others waiting. So the next
batch waits, while one comes right after the other, for its share of the calls that were open
whenever one of the last batches ended, callers on their way back from the batch before among them.
With callers who come by chance that is none or few.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

_BATCHES: Final = 32  # that are looked back at
_PATIENCE: Final = 0.01  # seconds, at most, for the next call

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """More work waits than may."""


class Batcher(Generic[Item, Result]):
    """Runs a function over the calls of many callers, a few batches at a time.

    Args:
        run: maps calls to their results, in order.
        weigh: returns the work of a call, in any unit.
        max_weight: of a batch; a single call may exceed it.
        max_waiting: weight that may wait for a batch; None = any.
        parallel: batches that run at the same time.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        weigh: Callable[[Item], int],
        max_weight: int,
        max_waiting: int | None = None,
        parallel: int = 1,
    ) -> None:
        self._run = run
        self._weigh = weigh
        self._max_weight = max_weight
        self._max_waiting = max_waiting
        self._parallel = parallel
        self._waiting: deque[tuple[Item, int, asyncio.Future[Result]]] = deque()
        self._weight = 0
        self._working = 0
        self._tasks: set[asyncio.Task[None]] = set()
        # Calls, and their weight, of the batches that run.
        self._running = 0
        self._load = 0
        # Callers who were answered and are on their way back, as far as is known.
        self._away = 0
        # The calls that were open at the ends of the last batches, those away among them.
        self._open = deque([0], maxlen=_BATCHES)
        # From the batch that ended last, and until when: the seconds that the next one waits for a
        # call.
        self._patience = 0.0
        self._until = -math.inf
        # Set while a batch waits for more calls; fulfilled when one comes.
        self._more: asyncio.Future[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result of a call.

        Raises:
            Overloaded: too much work waits; nothing was done.
            Exception: what the function raised for the batch that held the call.
        """
        weight = self._weigh(item)
        full = self._max_waiting is not None and self._weight + weight > self._max_waiting
        if full and self._waiting:
            raise Overloaded(f"{len(self._waiting)} calls wait already; send again in a moment")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, weight, future))
        self._weight += weight
        self._away = max(0, self._away - 1)
        if self._more is None:
            self._start()
        elif not self._more.done():
            self._more.set_result(None)
        return await future

    def _start(self) -> None:
        if self._working < self._parallel:
            self._working += 1
            worker = asyncio.create_task(self._work())
            self._tasks.add(worker)
            worker.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        try:
            await self._run_all()
        finally:
            # Here, not when the task is told to have ended: what is submitted in between would
            # wait for nobody.
            self._working -= 1

    async def _run_all(self) -> None:
        while self._waiting:
            await self._wait_for_more()
            batch, load = self._take()
            if not batch:
                break
            began = time.monotonic()
            self._running += len(batch)
            self._load += load
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            finally:
                self._plan(len(batch), time.monotonic() - began)
                self._running -= len(batch)
                self._load -= load
            for (_, future), result in zip(batch, results, strict=True):
                # A caller that timed out or hung up has cancelled its future.
                if not future.done():
                    future.set_result(result)

    def _plan(self, calls: int, seconds: float) -> None:
        if time.monotonic() > self._until:
            self._away = 0
        self._open.append(len(self._waiting) + self._running + self._away)
        self._away += calls
        # What a call took: that is less than what it costs to run alone. After a stall nobody is
        # to wait for those who gave up.
        self._patience = min(seconds / calls, _PATIENCE)
        self._until = time.monotonic() + seconds

    async def _wait_for_more(self) -> None:
        if self._more or time.monotonic() > self._until:
            return
        loop = asyncio.get_running_loop()
        came = True
        try:
            while came and not self._is_enough():
                self._more = loop.create_future()
                came = bool((await asyncio.wait([self._more], timeout=self._patience))[0])
            if not came:
                self._away = 0
        finally:
            self._more = None

    def _is_enough(self) -> bool:
        # The least that was open stands there all the time; of what comes and goes by chance no
        # more is to be expected. And those that run cannot come.
        share = min(math.ceil(min(self._open) / self._parallel), max(self._open) - self._running)
        return len(self._waiting) >= share or self._weight >= self._max_weight

    def _take(self) -> tuple[list[tuple[Item, asyncio.Future[Result]]], int]:
        """Return the next batch and its weight; the others get what is left."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        total = 0
        share = math.ceil((self._weight + self._load) / self._parallel)
        most = min(self._max_weight, share)
        while self._waiting:
            item, weight, future = self._waiting[0]
            if batch and total + weight > most:
                self._start()
                break
            self._waiting.popleft()
            self._weight -= weight
            if future.done():
                continue
            batch.append((item, future))
            total += weight
        return batch, total
