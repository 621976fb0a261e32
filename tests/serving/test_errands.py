"""Functions that hang: nobody waits for them for long, and what follows is not held up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from serving.batching import Overloaded
from serving.errands import Errands


def test_a_result_and_an_error_come_back() -> None:
    async def run() -> None:
        errands = Errands()
        assert await errands.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await errands.run(lambda: 1 // 0)
        await errands.end(lambda: None)

    asyncio.run(run())


def test_who_waits_gives_up_and_what_nobody_waits_for_is_not_begun() -> None:
    begun = []

    async def run() -> list[object]:
        hang = threading.Event()
        errands = Errands(threads=2, most=5, seconds=0.2)

        def do(number: int) -> None:
            begun.append(number)
            hang.wait(60)

        async def ask(number: int) -> None:
            await errands.run(lambda: do(number))

        found: list[object] = [*await asyncio.gather(*map(ask, range(6)), return_exceptions=True)]
        hang.set()
        assert await errands.run(lambda: "free again") == "free again"
        return found

    found = asyncio.run(run())
    assert [type(error) for error in found] == [*[TimeoutError] * 5, Overloaded]
    assert sorted(begun) == [0, 1]


def test_the_end_waits_for_nobody_who_hangs() -> None:
    async def run() -> float:
        hang = threading.Event()
        errands = Errands(threads=1, seconds=0.1)
        with pytest.raises(TimeoutError):
            await errands.run(lambda: hang.wait(60))
        began = time.monotonic()
        await errands.end(lambda: None, seconds=0.2)
        hang.set()
        return time.monotonic() - began

    assert asyncio.run(run()) < 5


HANG = """
import asyncio, contextlib, time
from serving.errands import Errands

async def main():
    with contextlib.suppress(TimeoutError):
        await Errands(seconds=0.1).run(lambda: time.sleep(120))

asyncio.run(main())
"""


def test_a_process_ends_though_a_thread_hangs() -> None:
    subprocess.run([sys.executable, "-c", HANG], check=True, timeout=60)
