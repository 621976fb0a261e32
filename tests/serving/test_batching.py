from __future__ import annotations

import asyncio

import pytest

from serving.batching import Batcher, Overloaded


class Recorder:
    """Doubles numbers; batches wait until they are let go."""

    def __init__(self, *, free: bool = False) -> None:
        self.batches: list[list[list[int]]] = []
        self.go = asyncio.Event()
        self.running = 0
        self.most = 0
        if free:
            self.go.set()

    async def __call__(self, calls: list[list[int]]) -> list[list[int]]:
        self.batches.append(calls)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if [-1] in calls:
            raise ValueError("poison")
        return [[2 * item for item in call] for call in calls]

    def batcher(
        self, max_weight: int, *, max_waiting: int | None = None, parallel: int = 1
    ) -> Batcher[list[int], list[int]]:
        return Batcher(
            self, weigh=len, max_weight=max_weight, max_waiting=max_waiting, parallel=parallel
        )


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_lone_call_runs_at_once() -> None:
    recorder = Recorder(free=True)
    assert asyncio.run(recorder.batcher(8).submit([1, 2])) == [2, 4]
    assert recorder.batches == [[[1, 2]]]


def test_calls_that_arrive_during_a_batch_share_the_next() -> None:
    async def scenario() -> list[list[int]]:
        first = asyncio.create_task(batcher.submit([1]))
        await settle()
        others = [asyncio.create_task(batcher.submit([i, 10 * i])) for i in range(2, 6)]
        await settle()
        recorder.go.set()
        return list(await asyncio.gather(first, *others))

    recorder = Recorder()
    batcher = recorder.batcher(6)
    assert asyncio.run(scenario()) == [[2], [4, 40], [6, 60], [8, 80], [10, 100]]
    assert recorder.batches == [[[1]], [[2, 20], [3, 30], [4, 40]], [[5, 50]]]


def test_as_many_batches_run_at_a_time_as_may() -> None:
    async def scenario() -> None:
        calls = []
        for i in range(6):
            calls.append(asyncio.create_task(batcher.submit([i, i])))
            await settle()
        assert recorder.batches == [[[0, 0]], [[1, 1]]]
        recorder.go.set()
        assert await asyncio.gather(*calls) == [[2 * i, 2 * i] for i in range(6)]

    recorder = Recorder()
    batcher = recorder.batcher(4, parallel=2)
    asyncio.run(scenario())
    assert recorder.most == 2
    assert [len(batch) for batch in recorder.batches] == [1, 1, 2, 2]


def test_a_call_that_comes_when_the_last_one_goes_is_run() -> None:
    async def scenario() -> None:
        for i in range(50):
            assert await asyncio.wait_for(batcher.submit([i]), 5) == [2 * i]

    batcher = Recorder(free=True).batcher(1)
    asyncio.run(scenario())


def test_a_call_larger_than_a_batch_runs_alone() -> None:
    recorder = Recorder(free=True)
    assert asyncio.run(recorder.batcher(2).submit([1, 2, 3])) == [2, 4, 6]


def test_an_error_reaches_its_callers_and_the_next_batch_works() -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="poison"):
            await batcher.submit([-1])
        assert await batcher.submit([4]) == [8]

    batcher = Recorder(free=True).batcher(2)
    asyncio.run(scenario())


def test_a_caller_that_gives_up_costs_no_work() -> None:
    async def scenario() -> None:
        first = asyncio.create_task(batcher.submit([1]))
        await settle()
        gone = asyncio.create_task(batcher.submit([2]))
        kept = asyncio.create_task(batcher.submit([3]))
        await settle()
        first.cancel()
        gone.cancel()
        await settle()
        recorder.go.set()
        assert await kept == [6]

    recorder = Recorder()
    batcher = recorder.batcher(8)
    asyncio.run(scenario())
    assert recorder.batches == [[[1]], [[3]]]


def test_beyond_what_may_wait_work_is_refused_at_once() -> None:
    async def scenario() -> None:
        first = asyncio.create_task(batcher.submit([1, 2]))
        await settle()
        waiting = [asyncio.create_task(batcher.submit([i, i])) for i in (3, 4)]
        await settle()
        with pytest.raises(Overloaded):
            await batcher.submit([5])
        recorder.go.set()
        assert await asyncio.gather(first, *waiting) == [[2, 4], [6, 6], [8, 8]]
        assert await batcher.submit([6]) == [12]

    recorder = Recorder()
    batcher = recorder.batcher(2, max_waiting=4)
    asyncio.run(scenario())
