"""Addresses of one shopper, and the metrics, beside BentoML's calls, which are POST alone.

Ids stand in the path, percent-encoded, and may hold slashes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final
from urllib.parse import unquote_to_bytes

import bentoml
from bentoml.exceptions import BentoMLException
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from serving.metrics import describe
from serving.middleware import CODES
from serving.schema import (
    EraseResponse,
    ExplainResponse,
    ExplanationQuestion,
    ItemsQuestion,
    PredictionQuestion,
    Profile,
    StoredId,
    StoredItems,
    StoredPrediction,
    StoredProfile,
)

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    HTTPStatus.BAD_REQUEST.value: {"description": "Malformed JSON, or an unknown target"},
    HTTPStatus.TOO_MANY_REQUESTS.value: {"description": "Send again in a moment"},
}
_MISSING: Final[dict[int | str, dict[str, Any]]] = _ERRORS | {
    HTTPStatus.NOT_FOUND.value: {"description": "Nothing was collected of this shopper"}
}
_USER: Final = "/users/{user_id:path}"
_PROFILE: Final = {
    "required": True,
    "content": {"application/json": {"schema": Profile.model_json_schema()}},
}


def read_user_id(
    request: Request, user_id: Annotated[StoredId, Path(description="Percent-encoded.")]
) -> str:
    """Return the id in the path.

    Raises:
        HTTPException: its bytes are no UTF-8, in whose place the server has put a mark, or end with
            a new line, which the framework has left out: it might be another shopper's id.
    """
    try:
        path = unquote_to_bytes(request.scope.get("raw_path", b"")).decode()
    except UnicodeDecodeError:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the address is not UTF-8") from None
    if "\n" in path:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "an id must not hold control characters")
    return user_id


async def read_profile(request: Request) -> Profile:
    """Return the profile in the body, which is judged as JSON: strict, and times are texts.

    Raises:
        RequestValidationError: it is none.
    """
    try:
        return Profile.model_validate_json(await request.body())
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(found) from None


UserId = Annotated[str, Depends(read_user_id)]
Service = Annotated[Any, Depends(bentoml.get_current_service)]


def make_reads() -> FastAPI:
    """Return the application with these addresses."""
    # Its description is part of BentoML's, at /docs.json.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(BentoMLException, _refuse)

    @app.get(f"{_USER}/prediction", responses=_MISSING)
    async def read_prediction(
        service: Service, user_id: UserId, asked: Annotated[PredictionQuestion, Query()]
    ) -> StoredPrediction:
        """Predict a shopper from what was collected."""
        told: StoredPrediction = await service.tell_stored(user_id, _now(asked), asked.next_items)
        return told

    @app.get(f"{_USER}/next-items", responses=_MISSING)
    async def read_next_items(
        service: Service, user_id: UserId, asked: Annotated[ItemsQuestion, Query()]
    ) -> StoredItems:
        """Tell the items that may come next, and when a purchase is to be expected."""
        told: StoredPrediction = await service.tell_stored(user_id, _now(asked), asked.count)
        return StoredItems(**{name: getattr(told, name) for name in StoredItems.model_fields})

    @app.get(f"{_USER}/explanation", responses=_MISSING)
    async def read_explanation(
        service: Service, user_id: UserId, asked: Annotated[ExplanationQuestion, Query()]
    ) -> ExplainResponse:
        """Tell which of the collected events moved a prediction."""
        told: ExplainResponse = await service.explain_stored(user_id, asked.target, _now(asked))
        return told

    @app.put(_USER, responses=_ERRORS, openapi_extra={"requestBody": _PROFILE})
    async def write_profile(
        service: Service, user_id: UserId, profile: Annotated[Profile, Depends(read_profile)]
    ) -> StoredProfile:
        """Keep what the shop knows of a shopper, in place of what was kept before."""
        kept: StoredProfile = await service.keep_profile(user_id, profile)
        return kept

    @app.delete(_USER, responses=_ERRORS)
    async def erase(service: Service, user_id: UserId) -> EraseResponse:
        """Delete all that was collected of a shopper, and their rows in the exports."""
        erased: EraseResponse = await service.forget(user_id)
        return erased

    @app.get("/metrics", include_in_schema=False)
    def read_metrics() -> Response:
        content, kind = describe()
        return Response(content, media_type=kind)

    return app


def _now(asked: PredictionQuestion | ItemsQuestion | ExplanationQuestion) -> datetime:
    return asked.now or datetime.now(UTC)


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    """Answer with an error in the service's form."""
    if isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
    else:
        status = getattr(error, "error_code", HTTPStatus.INTERNAL_SERVER_ERROR).value
        text = str(error)
    content = {"code": CODES.get(status, f"http_{status}"), "message": text, "field": None}
    return JSONResponse({"error": content}, status)
