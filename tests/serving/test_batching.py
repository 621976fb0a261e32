from __future__ import annotations

import asyncio

import pytest

from serving.batching import _BATCHES, Batcher, Overloaded


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
    assert [len(batch) for batch in recorder.batches[:3]] == [1, 1, 2]
    assert sum(len(batch) for batch in recorder.batches) == 6


def test_a_batch_is_no_more_than_its_share_of_what_is_open() -> None:
    gates: list[asyncio.Event] = []
    sizes: list[int] = []

    async def run(calls: list[int]) -> list[int]:
        sizes.append(len(calls))
        gates.append(asyncio.Event())
        await gates[-1].wait()
        return calls

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(run, weigh=lambda _: 1, max_weight=16, parallel=2)
        calls = []
        for i in range(13):
            calls.append(asyncio.create_task(batcher.submit(i)))
            await settle()
        # Two run by themselves, eleven wait.
        gates[0].set()
        await settle()
        assert sizes == [1, 1, 6]
        gates[1].set()
        await settle()
        assert sizes == [1, 1, 6, 5]
        gates[2].set()
        gates[3].set()
        assert await asyncio.gather(*calls) == list(range(13))

    asyncio.run(scenario())


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


class Sleeper:
    """Answers a batch after a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []

    async def __call__(self, calls: list[int]) -> list[int]:
        self.sizes.append(len(calls))
        await asyncio.sleep(self.seconds)
        return calls

    def batcher(self, *, max_weight: int = 16, parallel: int = 1) -> Batcher[int, int]:
        return Batcher(self, weigh=lambda _: 1, max_weight=max_weight, parallel=parallel)


async def send_again(batcher: Batcher[int, int], caller: int, times: int) -> None:
    """Call, and call again a little later than the callers before this one."""
    for _ in range(times):
        await batcher.submit(caller)
        await asyncio.sleep(0.001 * caller)


def test_callers_that_send_again_one_after_the_other_share_batches() -> None:
    async def scenario() -> None:
        await asyncio.gather(*(send_again(batcher, caller, 60) for caller in range(6)))

    sleeper = Sleeper(0.02)
    batcher = sleeper.batcher()
    asyncio.run(scenario())
    assert sum(sleeper.sizes) == 360
    # Without the wait every second batch of one worker is of a single call.
    settled = sleeper.sizes[_BATCHES + 4 : -1]
    assert sum(settled) / len(settled) > 5


def test_callers_on_their_way_back_are_counted_until_they_are_waited_for_in_vain() -> None:
    async def scenario() -> None:
        for _ in range(2):
            await asyncio.gather(*(batcher.submit(i) for i in range(8)))
        # Where two batches end one after the other, the first one's callers are on their way.
        assert list(batcher._open)[-4:] == [8, 8, 8, 8]
        # One alone comes again, and waits for the others a little while.
        batcher._open.extend([8] * _BATCHES)
        batcher._patience, batcher._until = 0.001, float("inf")
        await batcher.submit(1)
        assert batcher._open[-1] == 1

    batcher = Sleeper(0.01).batcher(parallel=2)
    asyncio.run(scenario())


def test_a_call_waits_for_others_for_a_moment_and_only_after_a_batch() -> None:
    async def scenario() -> list[float]:
        times = []
        for seconds in (0.02, 3600.0):
            batcher._plan(4, seconds)
            batcher._open.extend([4] * _BATCHES)
            began = asyncio.get_running_loop().time()
            await batcher.submit(1)
            times.append(asyncio.get_running_loop().time() - began)
        # What comes later than the batch took is not from its callers.
        batcher._plan(4, 0.01)
        batcher._open.extend([4] * _BATCHES)
        batcher._patience = 3600.0
        await asyncio.sleep(0.02)
        await asyncio.wait_for(batcher.submit(1), 5)
        return times

    batcher = Sleeper(0.0).batcher()
    usual, stalled = asyncio.run(scenario())
    assert usual >= 0.0045
    # Not a share of the hour that the batch took.
    assert 0.009 <= stalled < 1


def test_calls_that_come_by_chance_are_not_waited_for() -> None:
    async def scenario() -> None:
        for i in range(40):
            await asyncio.gather(*(batcher.submit(i) for _ in range(1 + i % 3)))
        batcher._patience, batcher._until = 3600.0, float("inf")
        await asyncio.wait_for(batcher.submit(1), 5)

    sleeper = Sleeper(0.001)
    batcher = sleeper.batcher()
    asyncio.run(scenario())
    assert set(sleeper.sizes) == {1, 2, 3}


def test_no_wait_for_more_than_a_batch_may_hold() -> None:
    async def scenario() -> None:
        calls = []
        for i in range(5):
            calls.append(asyncio.create_task(batcher.submit(i)))
            await settle()
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        batcher._plan(1, 3600.0)
        batcher._open.extend([4] * _BATCHES)
        calls += [asyncio.create_task(batcher.submit(i)) for i in range(4)]
        await asyncio.wait_for(asyncio.gather(*calls), 5)

    sleeper = Sleeper(0.01)
    batcher = sleeper.batcher(max_weight=4, parallel=2)
    asyncio.run(scenario())
    assert max(sleeper.sizes) <= 4
    assert sum(sleeper.sizes) == 9
