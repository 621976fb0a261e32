"""Work that threads do ahead of those who wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_order(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Yield the results of tasks in their order.

    Args:
        tasks: taken one by one by whoever asks for results, so that what draws chance in making
            them draws it in order.
        workers: threads that do them, a task each in hand and one done ahead; 0 = none, a task is
            done when its result is asked for.

    Raises:
        Exception: what a task raised, in its place.
    """
    if not workers:
        for task in tasks:
            yield task()
        return
    going: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in tasks:
                going.append(pool.submit(task))
                if len(going) > workers:
                    yield going.popleft().result()
            while going:
                yield going.popleft().result()
        finally:
            for left in going:
                left.cancel()
