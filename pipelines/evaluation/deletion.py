"""Do explanations name what matters? Events are deleted, and predictions made again.

The deletion test (Samek et al. 2017, "Evaluating the visualization of what a deep neural network
has learned"): without the events that an explanation puts first, a prediction must move more than
without as many events drawn by chance.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from pipelines.config import Evaluation
from pipelines.evaluation.metrics import Floats, clean, draw_weights, interval, summarise
from pipelines.features.store import Sequences
from pipelines.model.explanation import Explanation, explain
from pipelines.model.heads import Target
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import Timeline

SHOPPERS: Final = 150
DELETED: Final = 5  # events of each shopper
_STEPS: Final = 12
_CLIP: Final = 1e-6


def measure_deletion(
    predictor: Predictor,
    sequences: Sequences,
    users: NDArray[np.int64],
    now: int,
    target: Target,
    config: Evaluation,
) -> dict[str, Any] | None:
    """Delete the events that moved predictions most, and others by chance.

    Args:
        predictor: a fitted model.
        sequences: all events.
        users: who is predicted; some of those with enough history are drawn.
        now: the cut, microseconds.
        target: binary.
        config: samples, confidence and seed.

    Returns:
        The block ``explanation`` of reports/evaluation.json; None where no history is long enough.
        Changes are mean absolute ones of the log odds.
    """
    chance = np.random.default_rng(config.seed)
    timeline = Timeline(sequences)
    cuts = timeline.cuts(users, np.full(len(users), now))
    read = np.minimum(cuts.position - timeline.offsets[cuts.user], predictor.spec.context)
    enough = users[read >= 2 * DELETED]
    if not len(enough):
        return None
    chosen = np.sort(chance.choice(enough, size=min(SHOPPERS, len(enough)), replace=False))
    sample = sequences.take(chosen)
    timeline = Timeline(sample)
    nows = np.full(len(chosen), now, dtype=np.int64)
    cuts = timeline.cuts(np.arange(len(chosen)), nows)
    found = explain(predictor, timeline, cuts, target, steps=_STEPS)
    before = _log_odds(predictor, sample, nows, target)
    changes = {
        name: np.abs(
            _log_odds(predictor, sample.without(_first(found, order)), nows, target) - before
        )
        for name, order in (
            ("explained", -np.abs(found.effect)),
            ("random", chance.random(len(found.effect))),
        )
    }
    weights = draw_weights(
        chosen.astype(np.int32), samples=config.bootstrap_samples, seed=config.seed
    )
    total = weights.sum(axis=1)
    means = {name: weights @ change / total for name, change in changes.items()}
    difference = means["explained"] - means["random"]
    low, high = interval(difference[1:], config.confidence)
    return {
        "target": target.name,
        "users": len(chosen),
        "deleted": DELETED,
        "gap": clean(np.median(np.abs(found.gap))),
        **{name: summarise(mean, config.confidence) for name, mean in means.items()},
        "difference": {"diff": clean(difference[0]), "low": low, "high": high},
    }


def _first(found: Explanation, order: Floats) -> NDArray[np.int64]:
    """Return the events that come first in every prediction by an order."""
    ranked = np.lexsort((order, found.row))
    starts = np.searchsorted(found.row[ranked], found.row[ranked])
    kept: NDArray[np.int64] = found.event[ranked[np.arange(len(ranked)) - starts < DELETED]]
    return kept


def _log_odds(
    predictor: Predictor, sequences: Sequences, nows: NDArray[np.int64], target: Target
) -> Floats:
    said = predictor.predict(sequences, nows)[target.name].astype(np.float64)
    odds: Floats = logit(np.clip(said, _CLIP, 1 - _CLIP))
    return odds
