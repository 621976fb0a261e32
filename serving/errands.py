"""Does what may hang in a few threads of its own, so that nothing else hangs with it.

A thread that waits for a database cannot be ended. So whoever asked gives up after some seconds,
what nobody waits for any more is not begun, and a process that ends leaves its threads behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from serving.admission import step_aside
from serving.batching import Overloaded

# What a database that works is asked at once needs no more threads than its pool has connections.
# Of one that hangs each keeps a thread for the seconds that the driver waits.
_THREADS: Final = 8
# So many are answered within a fraction of a second where the database works.
_MOST: Final = 128
# Connecting and one statement, as long as both are waited for.
_SECONDS: Final = 8.0

Result = TypeVar("Result")


class Errands:
    """Runs functions in threads, for as many callers and as long as is agreed.

    Args:
        threads: functions that run at once.
        most: callers that wait.
        seconds: that each of them waits.
    """

    def __init__(
        self, *, threads: int = _THREADS, most: int = _MOST, seconds: float = _SECONDS
    ) -> None:
        self._count = threads
        self._most = most
        self._seconds = seconds
        self._waiting = 0
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    async def run(self, do: Callable[[], Result]) -> Result:
        """Return a function's result, for a request.

        Raises:
            Overloaded: too many wait; nothing was done.
            TimeoutError: it takes too long. It may be done all the same.
        """
        return await self.wait_for(lambda: self.do(do))

    async def wait_for(self, begin: Callable[[], Awaitable[Result]]) -> Result:
        """Return what comes of something that errands are done for, for a request.

        Meanwhile the request takes no place of those that need no errand.

        Raises:
            Overloaded: too many wait; nothing was done.
            TimeoutError: it takes too long. It may be done all the same.
        """
        if self._waiting >= self._most:
            raise Overloaded(f"{self._waiting} calls wait for the store; send again in a moment")
        self._waiting += 1
        try:
            with step_aside():
                async with asyncio.timeout(self._seconds):
                    return await begin()
        finally:
            self._waiting -= 1

    async def do(self, do: Callable[[], Result]) -> Result:
        """Return a function's result.

        Raises:
            TimeoutError: it takes too long. It may be done all the same.
        """
        if not self._threads:
            # They keep no process from ending, as those of the standard library would.
            self._threads = [
                threading.Thread(target=self._work, name=f"errand-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        future: Future[Result] = Future()
        self._queue.put((future, do))
        async with asyncio.timeout(self._seconds):
            return await asyncio.wrap_future(future)

    async def end(self, last: Callable[[], object], *, seconds: float = 3.0) -> None:
        """End the threads after one more function, or leave them behind."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.do(last)
        for _ in self._threads:
            self._queue.put(None)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            future, do = task
            # Who has given up has cancelled it.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(do())
            except BaseException as error:
                future.set_exception(error)
            # Results are large, and the next task may be long in coming.
            del task, future, do
