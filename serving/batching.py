"""Batches concurrent calls without waiting for any.

While batches run, calls queue up; the next batch takes what is there. Under no load a call runs at
once and alone, under load batches grow by themselves, so there is no window to tune and none that
adds latency.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

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
        if self._working < self._parallel:
            self._working += 1
            worker = asyncio.create_task(self._work())
            self._tasks.add(worker)
            worker.add_done_callback(self._tasks.discard)
        return await future

    async def _work(self) -> None:
        try:
            await self._run_all()
        finally:
            # Here, not when the task is told to have ended: what is submitted in between would
            # wait for nobody.
            self._working -= 1

    async def _run_all(self) -> None:
        while batch := self._take():
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                # A caller that timed out or hung up has cancelled its future.
                if not future.done():
                    future.set_result(result)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        total = 0
        while self._waiting:
            item, weight, future = self._waiting[0]
            if batch and total + weight > self._max_weight:
                break
            self._waiting.popleft()
            self._weight -= weight
            if future.done():
                continue
            batch.append((item, future))
            total += weight
        return batch
