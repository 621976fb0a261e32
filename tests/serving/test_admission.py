"""What would wait too long is refused; a few clients, and probes, never are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.admission import (
    CALM_SECONDS,
    FLOOD_OPEN,
    FLOOD_WAIT_SECONDS,
    MAX_BURST_WAIT_SECONDS,
    MAX_WAIT_SECONDS,
    MIN_OPEN,
    Admit,
    step_aside,
)
from serving.direct import AnswerDirectly
from serving.middleware import LimitBody
from serving.service import Forecart


class Server:
    """An application that answers one request after the other, each in some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.waiting: list[asyncio.Future[None]] = []
        self.admit = Admit(self.app, clock=lambda: self.now)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        await future
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def answer(self, count: int) -> None:
        for future in self.waiting[:count]:
            self.now += self.seconds
            future.set_result(None)
            await asyncio.sleep(0)
        del self.waiting[:count]

    def ask(self, path: str = "/predict", size: int = 1000) -> asyncio.Task[int]:
        async def run() -> int:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"content-length", str(size).encode())]
            scope = {"type": "http", "method": "POST", "path": path, "headers": headers}

            async def receive() -> Any:
                return {"type": "http.request", "body": bytes(min(size, 1 << 20))}

            await self.admit(scope, receive, send)
            return int(sent[0]["status"])

        return asyncio.create_task(run())


async def learn(server: Server, *, size: int = 1000) -> None:
    """Let the server learn its speed."""
    for _ in range(100):
        server.ask(size=size)
        server.ask(size=size)
        await asyncio.sleep(0)
        await server.answer(2)


async def flood(server: Server, *, size: int = 1000, path: str = "/predict") -> int:
    """Send far too much at once; return how many are let in."""
    await learn(server, size=size)
    tasks = [server.ask(path, size=size) for _ in range(1000)]
    await asyncio.sleep(0)
    let_in = len(server.waiting)
    await server.answer(let_in)
    statuses = [await task for task in tasks]
    assert statuses.count(200) == let_in
    assert statuses.count(429) == 1000 - let_in
    return let_in


@pytest.mark.parametrize("milliseconds", [0.5, 2.0])
def test_as_many_are_let_in_as_are_answered_in_time(milliseconds: float) -> None:
    expected = MAX_BURST_WAIT_SECONDS * 1000 / milliseconds
    assert asyncio.run(flood(Server(milliseconds / 1000))) == pytest.approx(expected, rel=0.2)


async def offer(server: Server, load: float, seconds: float) -> list[int]:
    """Ask ``load`` times what can be answered; return how many were open at every answer."""
    tasks: list[asyncio.Task[int]] = []
    lengths = []
    for i in range(1, round(seconds / server.seconds) + 1):
        tasks += [server.ask() for _ in range(int(i * load) - int((i - 1) * load))]
        await asyncio.sleep(0)
        lengths.append(len(server.waiting))
        if not server.waiting:
            server.now += server.seconds
        await server.answer(1)
    while server.waiting:
        await server.answer(1)
    statuses = [await task for task in tasks]
    assert statuses.count(200) + statuses.count(429) == len(tasks)
    return lengths


def test_a_queue_that_stands_is_kept_short() -> None:
    """A little more comes than can be answered."""

    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        return await offer(server, 1.1, 6.0)

    lengths = asyncio.run(run())
    assert max(lengths) <= 1.2 * 1000 * MAX_BURST_WAIT_SECONDS
    assert max(lengths[4000:]) <= 1.2 * 1000 * MAX_WAIT_SECONDS
    assert min(lengths[4000:]) >= 1


@pytest.mark.parametrize(
    ("seconds", "most"), [(0.0005, 2000 * FLOOD_WAIT_SECONDS), (0.002, FLOOD_OPEN)]
)
@pytest.mark.parametrize("load", [1.5, 3.0])
def test_in_a_flood_next_to_no_queue_is_left(seconds: float, most: float, load: float) -> None:
    async def run() -> list[int]:
        server = Server(seconds)
        await learn(server)
        return await offer(server, load, 3.0)

    lengths = asyncio.run(run())
    known = round(1.5 / seconds)
    assert max(lengths) <= 1.2 * MAX_BURST_WAIT_SECONDS / seconds
    assert max(lengths[known:]) <= 1.2 * most
    # It is never idle.
    assert min(lengths[known:]) >= 1


def test_bodies_that_are_only_announced_keep_nobody_waiting() -> None:
    async def run() -> int:
        server = Server(0.001)
        await learn(server)
        never = asyncio.Event()

        async def receive() -> Any:
            await never.wait()

        async def send(_: Any) -> None:
            pass

        headers = [(b"content-length", b"8000000")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
        slow = [
            asyncio.create_task(server.admit(dict(scope), receive, send))
            for _ in range(3 * MIN_OPEN)
        ]
        await asyncio.sleep(0)
        good = server.ask()
        await asyncio.sleep(0)
        await server.answer(1)
        for task in slow:
            task.cancel()
        return await good

    assert asyncio.run(run()) == 200


def test_what_waits_for_the_store_keeps_nobody_waiting() -> None:
    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        speed = server.admit._seconds / server.admit._done
        back = asyncio.Event()
        serving = server.admit.app

        async def wait(scope: Any, receive: Any, send: Any) -> None:
            with step_aside():
                await back.wait()
            await serving(scope, receive, send)

        server.admit.app = wait
        stored = [server.ask("/users/predict") for _ in range(10 * MIN_OPEN)]
        await asyncio.sleep(0)
        server.admit.app = serving
        assert server.admit.wait == 0.0
        statuses = []
        for _ in range(50):
            # Seconds without work: the service is no slower for them.
            server.now += 1.0
            good = server.ask()
            await asyncio.sleep(0)
            await server.answer(1)
            statuses.append(await good)
        assert server.admit._seconds / server.admit._done < 2 * speed
        # Once the store has answered they count like all others.
        back.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(server.waiting) == len(stored)
        assert server.admit.wait > 0.2
        await server.answer(len(stored))
        statuses += [await task for task in stored]
        assert server.admit.wait == 0.0
        return statuses

    assert set(asyncio.run(run())) == {200}


def make_scope(size: int) -> dict[str, Any]:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(size).encode()),
    ]
    return {"type": "http", "method": "POST", "path": "/predict", "headers": headers}


def test_a_client_that_does_not_read_its_answer_keeps_nobody_waiting() -> None:
    async def run() -> float:
        server = Server(0.001)
        await learn(server)
        never = asyncio.Event()

        async def receive() -> Any:
            return {"type": "http.request", "body": bytes(1000)}

        async def send(_: Any) -> None:
            await never.wait()

        stuck = [
            asyncio.create_task(server.admit(make_scope(1000), receive, send))
            for _ in range(3 * MIN_OPEN)
        ]
        await asyncio.sleep(0)
        await server.answer(len(stuck))
        await asyncio.sleep(0)
        assert not any(task.done() for task in stuck)
        wait = server.admit.wait
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        assert server.admit.wait == 0.0
        return wait

    assert asyncio.run(run()) == 0.0


def test_time_in_which_bodies_are_waited_for_is_no_work() -> None:
    """Some clients send next to nothing for ever; another one calls now and then."""

    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        app = LimitBody(server.admit, max_bytes=1 << 20)
        never = asyncio.Event()

        async def wait() -> Any:
            await never.wait()

        async def send(_: Any) -> None:
            pass

        slow = [asyncio.create_task(app(make_scope(8000), wait, send)) for _ in range(3 * MIN_OPEN)]
        statuses = []
        for _ in range(100):
            server.now += 0.5
            good = server.ask()
            await asyncio.sleep(0)
            await server.answer(1)
            statuses.append(await good)
        assert server.admit.wait == 0.0
        assert server.admit._seconds / server.admit._done * 2024 < 0.01
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return statuses

    assert set(asyncio.run(run())) == {200}


def test_bodies_are_read_before_requests_are_counted() -> None:
    service: Any = Forecart
    order = [middleware for middleware, _ in service.middlewares]
    assert order.index(LimitBody) < order.index(Admit) < order.index(AnswerDirectly)


def test_what_is_refused_teaches_nothing() -> None:
    """A huge length that is announced, and refused at once, is no work that was done."""

    async def run() -> float:
        server = Server(0.001)
        await learn(server)
        before = server.admit._seconds / server.admit._done

        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 413, "headers": []})

        serving, server.admit.app = server.admit.app, refuse
        await server.ask(size=10**15)
        server.admit.app = serving
        await learn(server)
        return server.admit._seconds / server.admit._done / before

    assert asyncio.run(run()) == pytest.approx(1.0, rel=0.05)


def test_a_lull_of_a_moment_does_not_end_a_flood() -> None:
    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        await offer(server, 3.0, 3.0)
        server.now += 0.2
        return await offer(server, 3.0, 1.0)

    assert max(asyncio.run(run())) <= 1.2 * max(FLOOD_OPEN, 1000 * FLOOD_WAIT_SECONDS)


def test_a_burst_after_a_flood_is_let_in() -> None:
    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        await offer(server, 3.0, 3.0)
        await offer(server, 0.5, 2.0)
        tasks = [server.ask() for _ in range(150)]
        await asyncio.sleep(0)
        await server.answer(150)
        return [await task for task in tasks]

    assert set(asyncio.run(run())) == {200}


def test_of_a_burst_nothing_is_refused() -> None:
    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        tasks = []
        for _ in range(5):
            tasks += [server.ask() for _ in range(200)]
            await asyncio.sleep(0)
            await server.answer(200)
            server.now += 0.1
        return [await task for task in tasks]

    assert set(asyncio.run(run())) == {200}


def test_bursts_are_let_in_though_the_last_one_was_too_long() -> None:
    """Less comes than can be answered, but all at once: what was refused is no sign of a flood."""

    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        let_in = []
        for _ in range(5):
            server.now += 1.5
            tasks = [server.ask() for _ in range(int(1100 * MAX_BURST_WAIT_SECONDS))]
            await asyncio.sleep(0)
            let_in.append(len(server.waiting))
            await server.answer(let_in[-1])
            await asyncio.gather(*tasks)
        return let_in

    assert asyncio.run(run()) == [pytest.approx(1000 * MAX_BURST_WAIT_SECONDS, rel=0.05)] * 5


def test_of_what_comes_in_a_slow_moment_nothing_is_refused() -> None:
    """The machine does half as much for a while: a queue stands, and is gone again soon."""

    async def run() -> list[int]:
        server = Server(0.001)
        await learn(server)
        tasks: list[asyncio.Task[int]] = []
        lengths = []
        began = server.now
        for answered in range(2000):
            server.seconds = 0.002 if answered < 175 else 0.001
            due = int((server.now - began) / 0.00143)
            tasks += [server.ask() for _ in range(due - len(tasks))]
            await asyncio.sleep(0)
            lengths.append(len(server.waiting))
            if not server.waiting:
                server.now += server.seconds
            await server.answer(1)
        assert max(lengths) > 1000 * MAX_WAIT_SECONDS
        await server.answer(len(server.waiting))
        return [await task for task in tasks]

    assert set(asyncio.run(run())) == {200}


def test_a_stall_is_not_taken_for_a_slow_service() -> None:
    """The machine stalls for a fifth of a second; what came meanwhile is let in."""

    async def run() -> list[int]:
        server = Server(0.001)
        for _ in range(5):
            await learn(server)
        tasks = [server.ask() for _ in range(2)]
        await asyncio.sleep(0)
        server.now += 0.2
        await server.answer(2)
        tasks += [server.ask() for _ in range(120)]
        await asyncio.sleep(0)
        await server.answer(len(server.waiting))
        return [await task for task in tasks]

    assert set(asyncio.run(run())) == {200}


def test_a_slow_service_still_answers_a_few() -> None:
    assert asyncio.run(flood(Server(1.0))) == MIN_OPEN


def test_larger_requests_are_let_in_in_smaller_numbers() -> None:
    async def run() -> tuple[int, int]:
        server = Server(0.001)
        await flood(server, size=1000)
        server.now += CALM_SECONDS
        tasks = [server.ask(size=4 * 2024 - 1024) for _ in range(1000)]
        await asyncio.sleep(0)
        let_in = len(server.waiting)
        await server.answer(let_in)
        await asyncio.gather(*tasks)
        return let_in, int(MAX_BURST_WAIT_SECONDS * 1000 / 4)

    let_in, expected = asyncio.run(run())
    assert let_in == pytest.approx(expected, rel=0.3)


def test_probes_are_never_refused() -> None:
    assert asyncio.run(flood(Server(1.0), path="/livez")) == 1000
