from __future__ import annotations

import asyncio
import threading

import pytest

from serving.batching import Batcher, Overloaded


class Recorder:
    """Doubles numbers; the first batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.go.wait(10)
        if -1 in items:
            raise ValueError("poison")
        return [2 * item for item in items]


async def wait_for_batch(recorder: Recorder) -> None:
    while not recorder.batches:
        await asyncio.sleep(0.001)


def test_a_lone_request_runs_at_once() -> None:
    recorder = Recorder()
    recorder.go.set()
    batcher = Batcher(recorder, max_items=8)
    assert asyncio.run(batcher.submit([1, 2])) == [2, 4]
    assert recorder.batches == [[1, 2]]


def test_requests_that_arrive_during_a_batch_share_the_next() -> None:
    async def scenario() -> list[list[int]]:
        first = asyncio.create_task(batcher.submit([1]))
        await wait_for_batch(recorder)
        others = [asyncio.create_task(batcher.submit([i, 10 * i])) for i in range(2, 6)]
        await asyncio.sleep(0)
        recorder.go.set()
        return list(await asyncio.gather(first, *others))

    recorder = Recorder()
    batcher = Batcher(recorder, max_items=6)
    assert asyncio.run(scenario()) == [[2], [4, 40], [6, 60], [8, 80], [10, 100]]
    assert recorder.batches == [[1], [2, 20, 3, 30, 4, 40], [5, 50]]


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    recorder = Recorder()
    recorder.go.set()
    batcher = Batcher(recorder, max_items=2)
    assert asyncio.run(batcher.submit([1, 2, 3])) == [2, 4, 6]


def test_an_error_reaches_its_callers_and_the_next_batch_works() -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="poison"):
            await batcher.submit([-1])
        assert await batcher.submit([4]) == [8]

    recorder = Recorder()
    recorder.go.set()
    batcher = Batcher(recorder, max_items=2)
    asyncio.run(scenario())


def test_a_caller_that_gives_up_costs_no_work() -> None:
    async def scenario() -> None:
        first = asyncio.create_task(batcher.submit([1]))
        await wait_for_batch(recorder)
        gone = asyncio.create_task(batcher.submit([2]))
        kept = asyncio.create_task(batcher.submit([3]))
        await asyncio.sleep(0)
        first.cancel()
        gone.cancel()
        await asyncio.sleep(0)
        recorder.go.set()
        assert await kept == [6]

    recorder = Recorder()
    batcher = Batcher(recorder, max_items=8)
    asyncio.run(scenario())
    assert recorder.batches == [[1], [3]]


def test_beyond_what_may_wait_work_is_refused_at_once() -> None:
    async def scenario() -> None:
        release = threading.Event()

        def run(items: list[int]) -> list[int]:
            release.wait(10)
            return items

        batcher: Batcher[int, int] = Batcher(run, max_items=2, max_waiting=4)
        first = asyncio.create_task(batcher.submit([1, 2]))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(batcher.submit([i, i])) for i in (3, 4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await batcher.submit([5])
        release.set()
        assert await asyncio.gather(first, *waiting) == [[1, 2], [3, 3], [4, 4]]
        assert await batcher.submit([6]) == [6]

    asyncio.run(scenario())
