"""How well the next item was told: ranks of the truth, metrics with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Evaluation
from pipelines.evaluation.metrics import Floats, clean, draw_weights, interval, summarise

_FEW: Final = 10
_MANY: Final = 20

Ints = NDArray[np.int64]


def compare_rankings(
    user: NDArray[np.int32],
    truth: Ints,
    rankings: Mapping[str, Ints],
    *,
    candidate: str,
    items: int,
    config: Evaluation,
) -> dict[str, Any] | None:
    """Score rankings of items by where the item that came next stands in them.

    Args:
        user: (N,) of every row.
        truth: (N,), code of the item touched next, -1 = of none that could be told, -2 = no item
            was touched within the horizon: such rows are left out.
        rankings: model -> codes (N, up to 20), the best first.
        candidate: the model that is compared with each other one.
        items: that can be told.
        config: samples, confidence and seed.

    Returns:
        The block ``next_item`` of reports/evaluation.json; None where no item was touched.
    """
    rows = np.flatnonzero(truth >= -1)
    if not len(rows) or not items:
        return None
    weights = draw_weights(user[rows], samples=config.bootstrap_samples, seed=config.seed)
    samples = {
        name: _score(ranked[rows] == truth[rows, None], weights)
        for name, ranked in rankings.items()
    }
    return {
        "users": len(np.unique(user[rows])),
        "items": items,
        "known": clean((truth[rows] >= 0).mean()),
        "models": {
            name: {metric: summarise(v, config.confidence) for metric, v in scores.items()}
            for name, scores in samples.items()
        },
        "paired": {
            f"{candidate}-{name}": {
                metric: _difference(samples[candidate][metric], values, config.confidence)
                for metric, values in scores.items()
            }
            for name, scores in samples.items()
            if name != candidate
        },
    }


def _score(hits: NDArray[np.bool_], weights: Floats) -> dict[str, Floats]:
    """Weighted means of each row's metrics, (samples,) each.

    With one truth a row, NDCG is 1 / log2(1 + rank) (Jarvelin and Kekalainen 2002).
    """
    found = hits.any(axis=1)
    rank = np.where(found, hits.argmax(axis=1) if hits.shape[1] else 0, _MANY)
    by_row = {
        f"hit_rate_at_{_FEW}": (rank < _FEW).astype(np.float64),
        f"ndcg_at_{_MANY}": np.where(found, 1.0 / np.log2(rank + 2.0), 0.0),
        f"mrr_at_{_MANY}": np.where(found, 1.0 / (rank + 1.0), 0.0),
    }
    total = weights.sum(axis=1)
    return {metric: weights @ values / total for metric, values in by_row.items()}


def _difference(a: Floats, b: Floats, confidence: float) -> dict[str, float | None]:
    difference = a - b
    low, high = interval(difference[1:], confidence)
    return {"diff": clean(difference[0]), "low": low, "high": high}
