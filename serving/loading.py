"""Loads the model that is to serve, and makes sure of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.errors import UserError
from pipelines.features.store import encode_events
from pipelines.io import digest_directory, read_json
from serving.golden import compare_predictions, locate_golden

if TYPE_CHECKING:
    from pipelines.model.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and what it is called.

    Attributes:
        predictor: the model.
        digest: of its files.
    """

    predictor: Predictor
    digest: str


def load(model: Path, *, digest: str | None = None, check: bool = False) -> Loaded:
    """Load a model's folder.

    Args:
        model: the folder.
        digest: that its files have to have; None = any.
        check: whether it has to reproduce the golden predictions, which lie beside it.

    Raises:
        UserError: it holds no model that this code can use, or not the one that was promoted, or
            it does not predict what it should.
    """
    from pipelines.model.predictor import Predictor

    loaded = Loaded(predictor=Predictor.load(model), digest=digest_directory(model))
    if digest is not None and loaded.digest != digest:
        raise UserError(f"{model}: the files are {loaded.digest}, not {digest}")
    golden = locate_golden(model)
    if check and golden.is_file():
        problem = compare_predictions(loaded.predictor, read_json(golden), loaded.digest)
        if problem is not None:
            raise UserError(f"{model}: {problem}")
    _probe(loaded.predictor)
    return loaded


def _probe(predictor: Predictor) -> None:
    """Predict a shopper without events: the least that every model can do."""
    predicted = predictor.predict(encode_events([[]]), np.zeros(1, dtype=np.int64))
    wrong = [name for name, values in predicted.items() if not np.all(np.isfinite(values))]
    if wrong:
        raise UserError(f"predicts no number for {', '.join(sorted(wrong))}")
