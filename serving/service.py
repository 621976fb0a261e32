"""The prediction service: `bentoml serve` starts it, from a Bento or beside a model folder."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import bentoml
import numpy as np

from pipelines.features.store import encode_events
from pipelines.io import digest_directory
from serving.batching import Batcher
from serving.middleware import DropValidationErrors, LimitBody, ShapeErrors
from serving.schema import (
    MAX_BODY_BYTES,
    MAX_USERS,
    Prediction,
    PredictRequest,
    PredictResponse,
    User,
    resolve_now,
)

MODEL_VARIABLE: Final = "FORECART_MODEL"

# In a Bento the model lies beside the packages.
BUNDLED_MODEL: Final = Path(__file__).resolve().parents[1] / "model"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def find_model() -> Path:
    """Return the model's folder: what FORECART_MODEL names, else the Bento's own."""
    return Path(os.environ.get(MODEL_VARIABLE, BUNDLED_MODEL))


@bentoml.service(
    name="forecart",
    workers=1,
    traffic={"timeout": 30, "max_concurrency": 512},
    logging={"access": {"enabled": False}},
)
class Forecart:
    """Predicts what shoppers do next from their recent events."""

    def __init__(self) -> None:
        # Torch takes seconds to import, and building a Bento imports this module too.
        from pipelines.model.predictor import Predictor

        # BentoML logs every refused request with its text.
        logging.getLogger("bentoml._internal.server.http_app").addFilter(DropValidationErrors())
        model = find_model()
        self.predictor = Predictor.load(model)
        self.digest = digest_directory(model)
        self.batcher = Batcher(self._predict_batch, max_items=MAX_USERS)

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]  # BentoML is not typed
    async def predict(self, request: PredictRequest, /) -> PredictResponse:
        """Predict one or many shoppers from the events in the request."""
        now = resolve_now(request, datetime.now(UTC))
        predictions = await self.batcher.submit([(user, now) for user in request.users])
        return PredictResponse(model=self.digest, now=now, predictions=predictions)

    def _predict_batch(self, items: list[tuple[User, datetime]]) -> list[Prediction]:
        sequences = encode_events(
            [[event.model_dump() for event in user.events] for user, _ in items],
            [user.profile.model_dump() if user.profile else None for user, _ in items],
        )
        nows = np.array([(now - _EPOCH) // _MICROSECOND for _, now in items], dtype=np.int64)
        predicted = self.predictor.predict(sequences, nows)
        kinds = {target.name: target.kind for target in self.predictor.targets}
        return [
            Prediction(
                user_id=user.user_id,
                probabilities={
                    name: float(values[i])
                    for name, values in predicted.items()
                    if kinds[name] == "binary"
                },
                expected_spend={
                    name: float(values[i])
                    for name, values in predicted.items()
                    if kinds[name] == "amount"
                },
            )
            for i, (user, _) in enumerate(items)
        ]


# The decorator has made a service of the class. The first one added is the outermost: errors of
# the limits are shaped as well.
_service: Any = Forecart
_service.add_asgi_middleware(ShapeErrors)
_service.add_asgi_middleware(LimitBody, max_bytes=MAX_BODY_BYTES)
