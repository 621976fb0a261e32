"""The prediction service: `bentoml serve` starts it, from a Bento or beside a model folder."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, Final

import bentoml
from bentoml.exceptions import (
    BadInput,
    BentoMLException,
    InternalServerError,
    NotFound,
)
from sqlalchemy.exc import SQLAlchemyError

from pipelines.errors import UserError
from pipelines.events import to_us
from serving.access import ObserveRequests
from serving.admission import Admit
from serving.batching import Batcher, Item, Overloaded, Result
from serving.collect import (
    MAX_COLLECTED,
    CollectRequest,
    CollectResponse,
    Outcome,
    parse_event,
    summarise,
)
from serving.connections import install as install_connections
from serving.direct import AnswerDirectly
from serving.engine import Engine, Unavailable, find_count
from serving.errands import Errands
from serving.exports import erase_exported, find_exports
from serving.frames import Call, Explain, Explained, Predict, Predicted, Refused, Reply
from serving.keeping import AnswerOnce
from serving.keys import RequireKey
from serving.limits import MAX_EVENTS
from serving.metrics import Metrics, forget_dead
from serving.middleware import DropClientErrors, LimitBody, NotAvailable, ShapeErrors
from serving.reads import make_reads
from serving.schema import (
    MAX_BODY_BYTES,
    EraseRequest,
    EraseResponse,
    ExplainRequest,
    ExplainResponse,
    PredictRequest,
    PredictResponse,
    Profile,
    StoredPrediction,
    StoredProfile,
    StoredRequest,
    User,
    resolve_now,
)
from serving.store import Store, find_url
from serving.supervision import install as install_supervision
from serving.swap import Watcher, find_watched, locate
from serving.tracing import plan_tracing
from serving.welcome import ShowCalls

MODEL_VARIABLE: Final = "FORECART_MODEL"

# In a Bento the model lies beside the packages.
BUNDLED_MODEL: Final = Path(__file__).resolve().parents[1] / "model"

# Work of a call is told in the bytes of its request; of an event that was collected, about so many.
_EVENT_BYTES: Final = 128
# Some twenty shoppers with 100 events: larger batches gain nothing more and make others wait.
_BATCH_BYTES: Final = 1 << 18

# Shoppers whose events are read from the store at once, and events that one call may ask about:
# about as many as the largest body holds.
_STORED_USERS: Final = 32
_MAX_STORED_EVENTS: Final = 1 << 16
_TRIES: Final = 3

# Waiting beyond these, work is refused at once: its answer would come too late to be of use.
_MAX_WAITING_BYTES: Final = 4 * MAX_BODY_BYTES
_MAX_WAITING_EVENTS: Final = 20 * MAX_COLLECTED
_MAX_WAITING_EXPLANATIONS: Final = 16

# Exit status where the model is refused, as uvicorn's where a start fails.
_REFUSED: Final = 3

_UNKNOWN: Final = "no event of this shopper was collected before that time"

# A shopper that was checked: id, events and profile, with times as datetimes or microseconds.
Shopper = tuple[str, list[dict[str, Any]], dict[str, Any] | None]


def find_model() -> Path:
    """Return the model's folder: what FORECART_MODEL names, else the Bento's own."""
    return Path(os.environ.get(MODEL_VARIABLE, BUNDLED_MODEL))


@bentoml.service(
    name="forecart",
    workers=1,
    # Reading a request costs as much as predicting, and comes before the queues of the batches:
    # what is open at once is bounded by Admit.
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing=plan_tracing(),
)
class Forecart:
    """Predicts what shoppers do next from their recent events."""

    def __init__(self) -> None:
        # BentoML logs every refused request with its text.
        logging.getLogger("bentoml._internal.server.http_app").addFilter(DropClientErrors())
        forget_dead()
        self.metrics = Metrics()
        self.engine = Engine(find_count())
        self.predictions: Batcher[bytes | Call, bytes | None] = Batcher(
            self._predict_calls,
            weigh=_weigh,
            max_weight=_BATCH_BYTES,
            max_waiting=_MAX_WAITING_BYTES,
            parallel=self.engine.count,
        )
        # One at a time: it takes as long as many predictions, which need the others.
        self.explanations: Batcher[Explain, Reply] = Batcher(
            self._explain_calls,
            weigh=lambda _: 1,
            max_weight=1,
            max_waiting=_MAX_WAITING_EXPLANATIONS,
        )
        # Opened with the first event: a service that only predicts needs no store.
        self._store: Store | None = None
        # Why there is none: the environment stays as it is at the start.
        self._no_store = _find_lack()
        self._is_created = False
        self._opening = threading.Lock()
        # The store may hang, and predictions must not.
        self.errands = Errands()
        # Of SQLite nobody who writes keeps others from reading.
        self.reads = Errands(threads=4)
        self.collector: Batcher[list[dict[str, Any]], list[bool]] = Batcher(
            self._store_calls,
            weigh=len,
            max_weight=2 * MAX_COLLECTED,
            max_waiting=_MAX_WAITING_EVENTS,
        )
        self._erasing = asyncio.Lock()
        self._watcher: Watcher | None = None

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Load the model, and look for newer ones."""
        watched = find_watched()
        try:
            digest = await self._load(watched[0] if watched else None)
        except UserError as error:
            # At once: the framework would print where it happened, which tells nobody anything.
            logging.getLogger(__name__).critical("the model is refused: %s", error)
            os._exit(_REFUSED)
        self.metrics.show_model(digest)
        if self._no_store is not None:
            logging.getLogger(__name__).warning("%s", self._no_store)
        # What is there now stays: to look through it for garbage again and again would make some
        # requests wait for a tenth of a second.
        gc.collect()
        gc.freeze()
        if watched is None:
            return
        path, seconds = watched
        loop = asyncio.get_running_loop()

        def take(model: Path, digest: str | None) -> str:
            started = self.engine.start(model, digest=digest, check=True)
            return asyncio.run_coroutine_threadsafe(started, loop).result()

        self._watcher = Watcher(
            path, current=digest, take=take, metrics=self.metrics, seconds=seconds
        )
        self._watcher.start()

    async def _load(self, watched: Path | None) -> str:
        """Serve the champion of now, or else the model that the service was made with.

        A process that is started anew, after it was killed, must not go back to a model that was
        replaced since, which may have been for a reason.

        Raises:
            UserError: that one is refused, too.
        """
        try:
            found = locate(watched) if watched is not None else None
            if found is not None:
                return await self.engine.start(found[0], digest=found[1], check=True)
        except (UserError, Unavailable, OSError) as error:
            text = "the champion does not serve, the model that came with the service does: %s"
            logging.getLogger(__name__).error(text, error)
        return await self.engine.start(find_model(), check=True)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Look for no new model any more, end the processes that predict, and close the store."""
        if self._watcher is not None:
            self._watcher.stop()
        await self.engine.close()
        if self._store is not None:
            await asyncio.gather(self.reads.end(lambda: None), self.errands.end(self._store.close))

    async def __is_ready__(self) -> bool:
        """Return whether predictions can be had."""
        return self.engine.ready

    async def answer(self, body: bytes) -> bytes | None:
        """Answer the body of a request for predictions.

        Returns:
            The body of the answer; None where the schema has to judge the request.

        Raises:
            BentoMLException: the service has too much to do, or cannot predict.
        """
        return await self._submit(self.predictions, body)

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]  # BentoML is not typed
    async def predict(self, request: PredictRequest, /) -> PredictResponse:
        """Predict one or many shoppers from the events in the request."""
        # Good requests are answered before they come here: see AnswerDirectly.
        now = resolve_now(request, datetime.now(UTC))
        shoppers = [_to_shopper(user) for user in request.users]
        return await self._predict(shoppers, now, request.next_items)

    @bentoml.api(route="/users/predict")  # type: ignore[untyped-decorator]
    async def predict_stored(self, request: StoredRequest, /) -> PredictResponse:
        """Predict shoppers from the events and profiles that were collected of them.

        A shopper without collected events before `now` has no prediction and is left out.
        """
        now = request.now or datetime.now(UTC)
        shoppers: list[Shopper] = []
        ids = iter(request.user_ids)
        while some := list(islice(ids, _STORED_USERS)):
            shoppers += await self._find_shoppers(some, now)
            if sum(len(events) for _, events, _ in shoppers) > _MAX_STORED_EVENTS:
                text = f"these shoppers have more than {_MAX_STORED_EVENTS} events; ask for fewer"
                status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                raise BentoMLException(text, error_code=status)
        return await self._predict(shoppers, now, request.next_items)

    @bentoml.api(route="/events")  # type: ignore[untyped-decorator]
    async def collect(self, request: CollectRequest, /) -> CollectResponse:
        """Keep events; what is answered as accepted is on the disk.

        Every event is judged by itself. One that was sent before (the same `event_id`, or the
        same content where it has none) is a duplicate and changes nothing, so a client may send
        again what it had no answer for.
        """
        self._require_store()
        clock = datetime.now(UTC)
        parsed = [parse_event(raw, clock) for raw in request.events]
        rows = [row for row, _ in parsed if row is not None]
        kept: list[bool] = []
        if rows:
            kept = await _guard(self.errands.wait_for(lambda: self._submit(self.collector, rows)))
        new = iter(kept)
        results = [result for _, result in parsed]
        for row, result in parsed:
            if row is not None and not next(new):
                result.outcome = Outcome.DUPLICATE
        return summarise(results)

    @bentoml.api(route="/users/erase")  # type: ignore[untyped-decorator]
    async def erase(self, request: EraseRequest, /) -> EraseResponse:
        """Delete all that was collected of a shopper, and their rows in the exports."""
        return await self.forget(request.user_id)

    @bentoml.api(route="/explain")  # type: ignore[untyped-decorator]
    async def explain(self, request: ExplainRequest, /) -> ExplainResponse:
        """Tell which events and counts moved a prediction, and how much."""
        if request.user is None:
            now = request.now or datetime.now(UTC)
            return await self.explain_stored(str(request.user_id), request.target, now)
        whole = PredictRequest(users=[request.user], now=request.now)
        now = resolve_now(whole, datetime.now(UTC))
        return await self._explain(_to_shopper(request.user), request.target, now)

    async def tell_stored(self, user_id: str, now: datetime, next_items: int) -> StoredPrediction:
        """Predict one shopper from what was collected.

        Raises:
            NotFound: nothing was, before that time.
        """
        shoppers = await self._find_shoppers([user_id], now)
        if not shoppers:
            raise NotFound(_UNKNOWN)
        told = await self._predict(shoppers, now, next_items)
        (prediction,) = told.predictions
        return StoredPrediction(model=told.model, now=now, **dict(prediction))

    async def explain_stored(self, user_id: str, target: str, now: datetime) -> ExplainResponse:
        """Explain the prediction of one shopper from what was collected.

        Raises:
            BadInput: there is no such target.
            NotFound: nothing was collected before that time.
        """
        shoppers = await self._find_shoppers([user_id], now)
        if not shoppers:
            raise NotFound(_UNKNOWN)
        return await self._explain(shoppers[0], target, now)

    async def keep_profile(self, user_id: str, profile: Profile) -> StoredProfile:
        """Store what the shop knows of a shopper; answered means durable."""
        self._require_store()
        row = profile.model_dump()
        if profile.signup_ts is not None:
            row["signup_ts"] = to_us(profile.signup_ts)
        await _guard(self.errands.run(lambda: self._open_store().keep_profile(user_id, row)))
        return StoredProfile(user_id=user_id, profile=profile)

    async def forget(self, user_id: str) -> EraseResponse:
        """Delete a shopper from the store and the exports.

        Raises:
            NotAvailable: the exports are being written, or cannot be; the store has forgotten
                already.
        """
        self._require_store()
        erased = await _guard(self.errands.run(lambda: self._open_store().erase(user_id)))
        try:
            # One after the other, or they would wait for each other's files.
            async with self._erasing:
                exported = await asyncio.to_thread(erase_exported, find_exports(), user_id)
        except (UserError, OSError) as error:
            logging.getLogger(__name__).error("erasing from the exports failed: %s", error)
            known = isinstance(error, UserError)
            text = str(error) if known else "the exports cannot be changed; erase again later"
            raise NotAvailable(text) from None
        return EraseResponse(
            user_id=user_id, events=erased.events, profile=erased.profile, exported=exported
        )

    async def _find_shoppers(self, user_ids: Sequence[str], now: datetime) -> list[Shopper]:
        """Return those of some shoppers of whom an event was collected before a time."""
        self._require_store()

        def read() -> list[Shopper]:
            store = self._open_store()
            found = store.history(user_ids, before=to_us(now), limit=MAX_EVENTS)
            profiles = store.profiles(user_ids)
            return [
                (user_id, events, profiles.get(user_id))
                for user_id, events in found.items()
                if events
            ]

        shoppers: list[Shopper] = await _guard(self.reads.run(read))
        return shoppers

    async def _explain(self, shopper: Shopper, target: str, now: datetime) -> ExplainResponse:
        asked = Explain(Call([shopper], now), target)
        reply = await self._submit(self.explanations, asked)
        if isinstance(reply, Refused):
            raise BadInput(reply.problem)
        if not isinstance(reply, Explained):
            raise RuntimeError(f"{type(reply).__name__} is no explanation")
        return ExplainResponse.model_validate_json(reply.answer)

    async def _predict(
        self, shoppers: list[Shopper], now: datetime, next_items: int
    ) -> PredictResponse:
        """Predict shoppers a batch after the other, so that others wait for one at most.

        Raises:
            NotAvailable: models were exchanged in between, again and again.
        """
        for _ in range(_TRIES):
            told = PredictResponse(model=self.engine.digest, now=now, predictions=[])
            for some in _split(shoppers):
                answer = await self._submit(self.predictions, Call(some, now, next_items))
                part = PredictResponse.model_validate_json(answer or b"")
                told.predictions.extend(part.predictions)
                if part.model != told.model:
                    break
            else:
                return told
        raise NotAvailable("the model is being exchanged; send again")

    async def _submit(self, batcher: Batcher[Item, Result], item: Item) -> Result:
        try:
            result: Result = await _guard(batcher.submit(item))
        except Unavailable as error:
            raise NotAvailable(str(error)) from None
        if result == b"":
            raise InternalServerError("predicting failed")
        return result

    def _require_store(self) -> None:
        """Let go on where there is a place for what is collected.

        Raises:
            NotAvailable: FORECART_STORE names none.
        """
        if self._no_store is not None:
            raise NotAvailable(self._no_store)

    def _open_store(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = Store(find_url())
        # Each by itself: whoever waits for somebody else would wait for a database that hangs
        # once for everybody before.
        if not self._is_created:
            self._store.create()
            self._is_created = True
        return self._store

    async def _store_calls(self, calls: list[list[dict[str, Any]]]) -> list[list[bool]]:
        rows = [row for call in calls for row in call]
        new = iter(await self.errands.do(lambda: self._open_store().append(rows)))
        return [list(islice(new, len(call))) for call in calls]

    async def _predict_calls(self, calls: list[bytes | Call]) -> list[bytes | None]:
        # A batch is predicted by one process, so that one model answers it.
        reply = await self.engine.ask(Predict(calls, datetime.now(UTC)))
        if not isinstance(reply, Predicted):
            raise RuntimeError(f"{type(reply).__name__} is no prediction")
        if reply.users:
            self.metrics.count_batch(reply.users, reply.probabilities)
        return reply.answers

    async def _explain_calls(self, calls: list[Explain]) -> list[Reply]:
        return [await self.engine.ask(call) for call in calls]


def _find_lack() -> str | None:
    """Say why nothing can be collected here; None: there is a place for it."""
    try:
        find_url()
    except UserError as error:
        return str(error)
    return None


async def _guard(work: Any) -> Any:
    """Await work on the store; its failure is the service's state, not the client's mistake.

    Raises:
        BentoMLException: too much waits already; nothing was done.
        NotAvailable: the store does not answer; nothing was acknowledged.
    """
    try:
        return await work
    except Overloaded as error:
        status = HTTPStatus.TOO_MANY_REQUESTS
        raise BentoMLException(str(error), error_code=status) from None
    except (SQLAlchemyError, UserError, OSError) as error:
        logging.getLogger(__name__).error("the store failed: %s", type(error).__name__)
        raise NotAvailable("the store does not answer; send again later") from None


def _split(shoppers: Sequence[Shopper]) -> Iterator[list[Shopper]]:
    """Yield the shoppers in batches of so much work, at least one in each."""
    batch: list[Shopper] = []
    weight = 0
    for shopper in shoppers:
        own = _EVENT_BYTES * (1 + len(shopper[1]))
        if batch and weight + own > _BATCH_BYTES:
            yield batch
            batch, weight = [], 0
        batch.append(shopper)
        weight += own
    if batch:
        yield batch


def _to_shopper(user: User) -> Shopper:
    events = [event.model_dump() for event in user.events]
    return user.user_id, events, user.profile.model_dump() if user.profile else None


def _weigh(call: bytes | Call) -> int:
    """Return the work of a call, in bytes."""
    if isinstance(call, Call):
        return _EVENT_BYTES * sum(1 + len(events) for _, events, _ in call.users)
    return len(call)


async def _answer(body: bytes) -> bytes | None:
    found: bytes | None = await bentoml.get_current_service().answer(body)
    return found


def _find_digest() -> str:
    return str(bentoml.get_current_service().engine.digest)


# The decorator has made a service of the class. The first one added is the outermost: errors of
# the limits are shaped as well.
install_connections()
install_supervision()
_service: Any = Forecart
_service.mount_asgi_app(make_reads())
_service.add_asgi_middleware(ObserveRequests)
_service.add_asgi_middleware(ShapeErrors)
_service.add_asgi_middleware(RequireKey)
_service.add_asgi_middleware(AnswerOnce)
_service.add_asgi_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
_service.add_asgi_middleware(Admit)
_service.add_asgi_middleware(ShowCalls, find_digest=_find_digest)
_service.add_asgi_middleware(AnswerDirectly, answer=_answer)
