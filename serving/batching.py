"""Batches concurrent requests without waiting for any.

While one batch runs, requests queue up; the next batch takes what is there. Under no load a
request runs at once and alone, under load batches grow by themselves, so there is no window to
tune and none that adds latency.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """More items wait than may."""


class Batcher(Generic[Item, Result]):
    """Runs a function over items of many callers, one batch at a time, in a thread.

    Args:
        run: maps a list of items to their results, in order.
        max_items: largest batch; a single call may exceed it.
        max_waiting: items that may wait for a batch; None = any number.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result]],
        *,
        max_items: int,
        max_waiting: int | None = None,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[list[Item], asyncio.Future[list[Result]]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, items: list[Item]) -> list[Result]:
        """Return the results of some items.

        Raises:
            Overloaded: too many items wait; nothing was done.
            Exception: what the function raised for the batch that held the items.
        """
        waiting = sum(len(part) for part, future in self._waiting if not future.done())
        if self._max_waiting is not None and waiting and waiting + len(items) > self._max_waiting:
            raise Overloaded(f"{waiting} wait already; send again in a moment")
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch = self._take()
            items = [item for part, _ in batch for item in part]
            if not items:
                continue
            try:
                results = await asyncio.to_thread(self._run, items)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for part, future in batch:
                # A caller that timed out or hung up has cancelled its future.
                if not future.done():
                    future.set_result(results[start : start + len(part)])
                start += len(part)

    def _take(self) -> list[tuple[list[Item], asyncio.Future[list[Result]]]]:
        batch: list[tuple[list[Item], asyncio.Future[list[Result]]]] = []
        count = 0
        while self._waiting:
            part, future = self._waiting[0]
            if batch and count + len(part) > self._max_items:
                break
            self._waiting.popleft()
            if future.done():
                continue
            batch.append((part, future))
            count += len(part)
        return batch
