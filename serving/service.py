"""The prediction service: `bentoml serve` starts it, from a Bento or beside a model folder."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import bentoml
import numpy as np
from bentoml.exceptions import BadInput, BentoMLException, NotFound, ServiceUnavailable
from sqlalchemy.exc import SQLAlchemyError

from pipelines.errors import UserError
from pipelines.features.store import encode_events
from serving.access import ObserveRequests
from serving.admission import Admit
from serving.batching import Batcher, Overloaded
from serving.collect import (
    MAX_COLLECTED,
    CollectRequest,
    CollectResponse,
    Outcome,
    parse_event,
    summarise,
)
from serving.decode import to_mapping
from serving.exports import erase_exported, find_exports
from serving.keys import RequireKey
from serving.limits import MAX_EVENTS, MAX_USERS
from serving.metrics import Metrics
from serving.middleware import DropValidationErrors, LimitBody, ShapeErrors
from serving.reads import make_reads
from serving.schema import (
    MAX_BODY_BYTES,
    EraseRequest,
    EraseResponse,
    EventEffect,
    ExplainRequest,
    ExplainResponse,
    FeatureEffect,
    NextItem,
    Prediction,
    PredictRequest,
    PredictResponse,
    Profile,
    StoredPrediction,
    StoredProfile,
    StoredRequest,
    resolve_now,
)
from serving.store import Store, find_url, to_us
from serving.swap import Loaded, Watcher, find_watched, load
from serving.tracing import plan_tracing

MODEL_VARIABLE: Final = "FORECART_MODEL"

# In a Bento the model lies beside the packages.
BUNDLED_MODEL: Final = Path(__file__).resolve().parents[1] / "model"

# Waiting beyond these, work is refused at once: its answer would come too late to be of use.
_MAX_WAITING_USERS: Final = 4 * MAX_USERS
_MAX_WAITING_EVENTS: Final = 20 * MAX_COLLECTED

_MAX_EFFECTS: Final = 20
_UNKNOWN: Final = "no event of this shopper was collected before that time"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

# A shopper of a batch: id, events, profile, time from which to look ahead, items to tell. Times
# of events and profiles are datetimes, or microseconds as the store has them.
Shopper = tuple[str, Sequence[Any], dict[str, Any] | None, datetime, int]


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
        logging.getLogger("bentoml._internal.server.http_app").addFilter(DropValidationErrors())
        # Whoever reads it reads it once: a newly promoted model may take its place at any time.
        self.model = load(find_model())
        self.metrics = Metrics()
        self.metrics.show_model(self.model.digest)
        self.batcher = Batcher(
            self._predict_batch, max_items=MAX_USERS, max_waiting=_MAX_WAITING_USERS
        )
        # Opened with the first event: a service that only predicts needs no store.
        self._store: Store | None = None
        self.collector = Batcher(
            self._store_batch, max_items=2 * MAX_COLLECTED, max_waiting=_MAX_WAITING_EVENTS
        )
        self._watcher: Watcher | None = None
        watched = find_watched()
        if watched is not None:
            path, seconds = watched
            self._watcher = Watcher(
                path, current=self.model, take=self._take, metrics=self.metrics, seconds=seconds
            )
            self._watcher.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """Look for no new model any more."""
        if self._watcher is not None:
            self._watcher.stop()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]  # BentoML is not typed
    async def predict(self, request: PredictRequest, /) -> PredictResponse:
        """Predict one or many shoppers from the events in the request."""
        now = resolve_now(request, datetime.now(UTC))
        return await self._predict(_list_shoppers(request, now), now)

    @bentoml.api(route="/users/predict")  # type: ignore[untyped-decorator]
    async def predict_stored(self, request: StoredRequest, /) -> PredictResponse:
        """Predict shoppers from the events and profiles that were collected of them.

        A shopper without collected events before `now` has no prediction and is left out.
        """
        now = request.now or datetime.now(UTC)
        shoppers = await self._find_shoppers(request.user_ids, now, request.next_items)
        if not shoppers:
            return PredictResponse(model=self.model.digest, now=now, predictions=[])
        return await self._predict(shoppers, now)

    @bentoml.api(route="/events")  # type: ignore[untyped-decorator]
    async def collect(self, request: CollectRequest, /) -> CollectResponse:
        """Keep events; what is answered as accepted is on the disk.

        Every event is judged by itself. One that was sent before (the same `event_id`, or the
        same content where it has none) is a duplicate and changes nothing, so a client may send
        again what it had no answer for.
        """
        parsed = [parse_event(raw) for raw in request.events]
        rows = [row for row, _ in parsed if row is not None]
        new = iter(await self._submit(self.collector, rows) if rows else [])
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
        (shopper,) = _list_shoppers(whole, now)
        return await self._explain_one(shopper, request.target)

    async def tell_stored(self, user_id: str, now: datetime, next_items: int) -> StoredPrediction:
        """Predict one shopper from what was collected.

        Raises:
            NotFound: nothing was, before that time.
        """
        shoppers = await self._find_shoppers([user_id], now, next_items)
        if not shoppers:
            raise NotFound(_UNKNOWN)
        told = await self._predict(shoppers, now)
        (prediction,) = told.predictions
        return StoredPrediction(model=told.model, now=now, **dict(prediction))

    async def explain_stored(self, user_id: str, target: str, now: datetime) -> ExplainResponse:
        """Explain the prediction of one shopper from what was collected.

        Raises:
            BadInput: there is no such target.
            NotFound: nothing was collected before that time.
        """
        shoppers = await self._find_shoppers([user_id], now, 0)
        if not shoppers:
            raise NotFound(_UNKNOWN)
        return await self._explain_one(shoppers[0], target)

    async def keep_profile(self, user_id: str, profile: Profile) -> StoredProfile:
        """Store what the shop knows of a shopper; answered means durable."""
        row = profile.model_dump()
        if profile.signup_ts is not None:
            row["signup_ts"] = to_us(profile.signup_ts)
        await _guard(asyncio.to_thread(self._open_store().keep_profile, user_id, row))
        return StoredProfile(user_id=user_id, profile=profile)

    async def forget(self, user_id: str) -> EraseResponse:
        """Delete a shopper from the store and the exports.

        Raises:
            ServiceUnavailable: the exports are being written; the store has forgotten already.
        """
        erased = await _guard(asyncio.to_thread(self._open_store().erase, user_id))
        try:
            exported = await asyncio.to_thread(erase_exported, find_exports(), user_id)
        except UserError as error:
            logging.getLogger(__name__).error("%s", error)
            raise ServiceUnavailable(str(error)) from None
        return EraseResponse(
            user_id=user_id, events=erased.events, profile=erased.profile, exported=exported
        )

    async def _find_shoppers(
        self, user_ids: Sequence[str], now: datetime, next_items: int
    ) -> list[Shopper]:
        """Return those of some shoppers of whom an event was collected before a time."""

        def read() -> list[Shopper]:
            store = self._open_store()
            found = store.history(user_ids, before=to_us(now), limit=MAX_EVENTS)
            profiles = store.profiles(user_ids)
            return [
                (user_id, events, profiles.get(user_id), now, next_items)
                for user_id, events in found.items()
                if events
            ]

        shoppers: list[Shopper] = await _guard(asyncio.to_thread(read))
        return shoppers

    async def _explain_one(self, shopper: Shopper, target: str) -> ExplainResponse:
        try:
            return await asyncio.to_thread(self._explain, shopper, target)
        except UserError as error:
            raise BadInput(str(error)) from None

    async def _predict(self, shoppers: list[Shopper], now: datetime) -> PredictResponse:
        told = await self._submit(self.batcher, shoppers)
        # A call's shoppers are never split, so one model has predicted all of them.
        predictions = [prediction for _, prediction in told]
        return PredictResponse(model=told[0][0], now=now, predictions=predictions)

    def _take(self, model: Loaded) -> None:
        self.model = model

    async def _submit(self, batcher: Batcher[Any, Any], items: list[Any]) -> list[Any]:
        try:
            results: list[Any] = await _guard(batcher.submit(items))
            return results
        except Overloaded as error:
            status = HTTPStatus.TOO_MANY_REQUESTS
            raise BentoMLException(str(error), error_code=status) from None

    def _open_store(self) -> Store:
        if self._store is None:
            store = Store(find_url())
            store.create()
            self._store = store
        return self._store

    def _store_batch(self, rows: list[dict[str, Any]]) -> list[bool]:
        return self._open_store().append(rows)

    def _predict_batch(self, shoppers: list[Shopper]) -> list[tuple[str, Prediction]]:
        """Predict shoppers; with each the digest of the model that did."""
        from pipelines.model.timeline import Timeline

        model = self.model
        predictor = model.predictor
        sequences = encode_events(
            [events for _, events, *_ in shoppers], [profile for _, _, profile, *_ in shoppers]
        )
        timeline = Timeline(sequences)
        nows = np.array([to_us(now) for *_, now, _ in shoppers], dtype=np.int64)
        cuts = timeline.cuts(np.arange(len(shoppers)), nows)
        # Who wants fewer items than another gets the first of theirs.
        ahead = predictor.look_ahead(timeline, cuts, max(count for *_, count in shoppers))
        predicted = predictor.finish(ahead.raw)
        days = np.full(len(shoppers), np.nan)
        if "purchase" in predictor.spec.heads.events:
            days = predictor.days_until(ahead.raw, "purchase")
        names = predictor.spec.vocabulary.item_id
        kinds = {target.name: target.kind for target in predictor.targets}
        binary = {name: values for name, values in predicted.items() if kinds[name] == "binary"}
        self.metrics.count_batch(len(shoppers), binary)
        predictions = [
            Prediction(
                user_id=user_id,
                probabilities={name: float(values[i]) for name, values in binary.items()},
                expected_spend={
                    name: float(values[i])
                    for name, values in predicted.items()
                    if kinds[name] == "amount"
                },
                next_purchase=(
                    now + timedelta(days=float(days[i])) if np.isfinite(days[i]) else None
                ),
                next_items=[
                    NextItem(item_id=names[code], probability=float(chance))
                    for code, chance in zip(
                        ahead.items[i, :count], ahead.chances[i, :count], strict=True
                    )
                ],
            )
            for i, (user_id, _, _, now, count) in enumerate(shoppers)
        ]
        return [(model.digest, prediction) for prediction in predictions]

    def _explain(self, shopper: Shopper, name: str) -> ExplainResponse:
        from pipelines.model.explanation import explain
        from pipelines.model.timeline import Timeline, feature_names

        model = self.model
        predictor = model.predictor
        targets = {target.name: target for target in predictor.targets}
        if name not in targets:
            known = ", ".join(name for name, t in targets.items() if t.kind == "binary")
            raise UserError(f"target {name!r} is not one of {known}")
        target = targets[name]
        _, unordered, profile, now, _ = shopper
        events = sorted(map(to_mapping, unordered), key=lambda event: event["ts"])
        sequences = encode_events([events], [profile])
        timeline = Timeline(sequences)
        nows = np.array([to_us(now)], dtype=np.int64)
        cuts = timeline.cuts(np.zeros(1, dtype=np.int64), nows)
        found = explain(predictor, timeline, cuts, target)
        probability = float(predictor.predict(sequences, nows)[target.name][0])
        # Effects are on the event; that nobody does anything is its opposite.
        sign = -1.0 if target.event is None else 1.0
        order = np.argsort(-np.abs(found.effect), kind="stable")[:_MAX_EFFECTS]
        features = found.feature_effect[0]
        strongest = np.argsort(-np.abs(features), kind="stable")[:_MAX_EFFECTS]
        names = feature_names()
        return ExplainResponse(
            model=model.digest,
            now=now,
            target=target.name,
            probability=probability,
            start=sign * float(found.base[0]),
            end=sign * float(found.value[0]),
            gap=float(np.abs(found.gap[0])),
            events=[
                EventEffect(
                    ts=_to_time(events[found.event[i]]["ts"]),
                    event_type=str(events[found.event[i]]["event_type"]),
                    item_id=events[found.event[i]]["item_id"],
                    query=events[found.event[i]]["query"],
                    effect=sign * float(found.effect[i]),
                )
                for i in order
            ],
            features=[
                FeatureEffect(feature=names[i], effect=sign * float(features[i])) for i in strongest
            ],
        )


async def _guard(work: Any) -> Any:
    """Await work on the store; its failure is the service's state, not the client's mistake.

    Raises:
        ServiceUnavailable: the store does not answer; nothing was stored.
    """
    try:
        return await work
    except SQLAlchemyError as error:
        logging.getLogger(__name__).error("the store failed: %s", type(error).__name__)
        raise ServiceUnavailable("the store does not answer; send again later") from None


def _list_shoppers(request: PredictRequest, now: datetime) -> list[Shopper]:
    return [
        (
            user.user_id,
            user.events,
            to_mapping(user.profile) if user.profile else None,
            now,
            request.next_items,
        )
        for user in request.users
    ]


def _to_time(ts: datetime | int) -> datetime:
    return ts if isinstance(ts, datetime) else _EPOCH + ts * _MICROSECOND


# The decorator has made a service of the class. The first one added is the outermost: errors of
# the limits are shaped as well.
_service: Any = Forecart
_service.mount_asgi_app(make_reads())
_service.add_asgi_middleware(ObserveRequests)
_service.add_asgi_middleware(ShapeErrors)
_service.add_asgi_middleware(RequireKey)
_service.add_asgi_middleware(Admit)
_service.add_asgi_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
