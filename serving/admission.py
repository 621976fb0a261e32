"""Refuses at once what would wait too long, so that what is let in keeps its latency.

By Little's law what is let in waits as long as what is open takes: open work x time per unit of
work. The time is measured from the answers while the service is busy; the unit is a byte of the
request, since a call with many shoppers costs as many times more. A limit on the number of open
requests alone is right for one machine and one size of calls only.

Requests come in bursts, and every machine stalls for a moment at times: such a queue is gone again
soon, and nothing is refused for it. What counts is a queue that stands (as in CoDel, Nichols and
Jacobson, "Controlling queue delay", 2012). And where more is asked than can be done there is always
a queue, however short or long: then it is the shortest one that keeps the service busy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final

from serving.middleware import LATER, WITH_BODY, App, Message, Receive, Send, refuse, replay

# What waits longer is refused, but for so many requests that are open at any time: a service that
# is slow by itself still answers, and a few clients that wait for their answers are never refused.
MAX_WAIT_SECONDS: Final = 0.05
MIN_OPEN: Final = 32

# A queue stands if the wait has not been short for so long. Until then more may wait.
BURST_SECONDS: Final = 1.5
MAX_BURST_WAIT_SECONDS: Final = 0.4
_SHORT_WAIT_SECONDS: Final = 0.5 * MAX_WAIT_SECONDS

# What was asked in the last half second, in what can be done in it: where something was refused a
# moment ago and it is more than can be done, no queue is a burst's; and by so much more, it is a
# flood. What comes in bursts with pauses, or waits for its answers, asks for less.
CALM_SECONDS: Final = 2.0
FLOOD_LOAD: Final = 1.25
FLOOD_WAIT_SECONDS: Final = 0.015
FLOOD_OPEN: Final = 12
_ASKED_SECONDS: Final = 0.5

# A request's head is work as well.
_HEAD_BYTES: Final = 1_024
# Over so many seconds, and at least so many answers, the time of an answer is averaged: a stall of
# the machine passes for a slow service only as far as it is a share of them.
_SECONDS: Final = 1.0
_ANSWERS: Final = 64

_OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})


class _Place:
    """What a request takes of what may be open at once.

    Args:
        admit: counts what is open.
        work: of the request.
    """

    def __init__(self, admit: Admit, work: int) -> None:
        self._admit = admit
        self._work = work
        self._is_taken = False
        self._is_left = False

    def take(self) -> None:
        """Count as open."""
        if not self._is_taken and not self._is_left:
            self._is_taken = True
            self._admit.open(self._work)

    def give(self) -> None:
        """Count as open no more, for now."""
        if self._is_taken:
            self._is_taken = False
            self._admit.close(self._work)

    def leave(self, status: int) -> None:
        """Count as open no more, and learn from the answer."""
        if not self._is_left:
            self.give()
            self._is_left = True
            self._admit.learn(self._work if status < HTTPStatus.BAD_REQUEST else 0)


# The place of the request that is being answered.
_PLACE: Final[ContextVar[_Place | None]] = ContextVar("place", default=None)


@contextmanager
def step_aside() -> Iterator[None]:
    """Give the request's place to others while it waits for something that is not this service.

    However long that takes, it keeps nobody waiting, and tells nothing of how fast the service is.
    """
    place = _PLACE.get()
    if place is None:
        yield
        return
    place.give()
    try:
        yield
    finally:
        place.take()


class Admit:
    """Lets requests in as long as they will not wait for long.

    It stands inside of ``LimitBody``: a request is open from when it is there as a whole until its
    answer is, so that clients that send or read slowly keep nobody waiting.

    Args:
        app: the application inside.
        clock: seconds.
    """

    def __init__(self, app: App, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        self._requests = 0
        self._work = 0
        # Sums that fade: seconds between answers while busy, and the work that was done in them.
        self._seconds = 0.0
        self._done = 0.0
        self._since = 0.0
        # What was asked, refused or not: a sum that fades, and when it was right.
        self._asked = 0.0
        self._asked_at = clock()
        # When the wait was short last, and when something was refused.
        self._short = clock()
        self._refused = -math.inf

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        work = _HEAD_BYTES
        if scope["method"] in WITH_BODY:
            body = (await receive()).get("body", b"")
            work += len(body)
            receive = replay(body, receive)
        now = self._clock()
        self._note_asked(now, work)
        most, limit = self._find_limits(now)
        if self._requests >= most and self.wait > limit:
            self._refused = now
            text = f"{self._requests} requests wait already; send again in a moment"
            await refuse(send, HTTPStatus.TOO_MANY_REQUESTS, text, LATER)
            return
        place = _Place(self, work)
        place.take()
        _PLACE.set(place)

        async def pass_on(message: Message) -> None:
            # Before it is sent: that waits for the client.
            if message["type"] == "http.response.start":
                place.leave(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, pass_on)
        finally:
            place.leave(HTTPStatus.INTERNAL_SERVER_ERROR)

    def open(self, work: int) -> None:
        """Count a request."""
        if not self._requests:
            self._since = self._clock()
        self._requests += 1
        self._work += work

    def close(self, work: int) -> None:
        """Count a request no more."""
        self._requests -= 1
        self._work -= work

    def learn(self, work: int) -> None:
        """Take an answer into account; of a refusal or an error (work 0) nothing is learnt."""
        now = self._clock()
        passed = now - self._since
        self._since = now
        if work:
            fade = 1 - min(passed / _SECONDS, 1 / _ANSWERS)
            self._seconds = self._seconds * fade + passed
            self._done = self._done * fade + work
        self._note_wait(now)

    def _find_limits(self, now: float) -> tuple[int, float]:
        """Return how many may be open in any case, and the seconds that a request may wait."""
        self._note_wait(now)
        load = self.load if now - self._refused < CALM_SECONDS else 0.0
        if load > FLOOD_LOAD:
            return FLOOD_OPEN, FLOOD_WAIT_SECONDS
        stands = load > 1.0 or now - self._short > BURST_SECONDS
        return MIN_OPEN, MAX_WAIT_SECONDS if stands else MAX_BURST_WAIT_SECONDS

    def _note_asked(self, now: float, work: int) -> None:
        self._asked = self._asked * math.exp((self._asked_at - now) / _ASKED_SECONDS) + work
        self._asked_at = now

    def _note_wait(self, now: float) -> None:
        if self.wait <= _SHORT_WAIT_SECONDS:
            self._short = now

    @property
    def wait(self) -> float:
        """Seconds that a request would wait now, as far as is known."""
        return self._work * self._seconds / self._done if self._done else 0.0

    @property
    def load(self) -> float:
        """How many times what can be done was asked of late, refused or not."""
        return self._asked / _ASKED_SECONDS * self._seconds / self._done if self._done else 0.0
