"""What Prometheus is told beside BentoML's own counts and latencies: batches, predictions, model.

Predictions are counted by value alone; nothing tells whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_PROBABILITIES: Final = (0.01, 0.02, 0.05, *(n / 10 for n in range(1, 11)))


class Metrics:
    """Counts of one process.

    Args:
        registry: where they are kept; None = the one that /metrics shows.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # BentoML names the folder that its processes share after it has imported the service,
        # and the library looks for it on import.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        chosen = registry or REGISTRY
        self._batch = Histogram(
            "forecart_batch_users",
            "Shoppers predicted at once",
            buckets=_BATCH_SIZES,
            registry=chosen,
        )
        self._probability = Histogram(
            "forecart_probability",
            "Predicted probabilities",
            ["target"],
            buckets=_PROBABILITIES,
            registry=chosen,
        )
        self._model = Gauge(
            "forecart_model_info",
            "1 for the model that serves",
            ["digest"],
            multiprocess_mode="livemax",
            registry=chosen,
        )
        self._swaps = Counter(
            "forecart_model_swaps",
            "New models by what became of them",
            ["outcome"],
            registry=chosen,
        )
        for outcome in ("taken", "refused"):
            self._swaps.labels(outcome)

    def count_batch(self, users: int, probabilities: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Count a batch.

        Args:
            users: in it.
            probabilities: target -> (users,).
        """
        self._batch.observe(users)
        for name, values in probabilities.items():
            histogram = self._probability.labels(name)
            for value in values.tolist():
                histogram.observe(value)

    def show_model(self, digest: str, *, before: str | None = None) -> None:
        """Tell which model serves, and that another one no longer does."""
        if before is not None:
            self._model.labels(before).set(0)
        self._model.labels(digest).set(1)

    def count_swap(self, *, taken: bool) -> None:
        """Count a new model that was taken, or refused."""
        self._swaps.labels("taken" if taken else "refused").inc()
