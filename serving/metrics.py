"""What Prometheus is told: requests, batches, predictions, model.

Nothing tells whose they are: predictions are counted by value alone, requests by route. BentoML's
own counts are switched off, as they keep every path that anybody asks for, ids and all, for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_PROBABILITIES: Final = (0.01, 0.02, 0.05, *(n / 10 for n in range(1, 11)))


# What prometheus_client keeps of the gauges of one process.
_GAUGES: Final = re.compile(r"gauge_live\w*_(\d+)\.db")

_REQUEST: Final = Histogram(
    "forecart_request_seconds",
    "Time from a request to its answer",
    ["route", "status"],
    buckets=_SECONDS,
)


def forget_dead() -> None:
    """Leave out the gauges of processes that have ended.

    One that was killed told which model it served, and would tell so for ever beside the one that
    took its place. Its counts stay, as Prometheus wants them.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_live*.db") if folder else ():
        found = _GAUGES.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            multiprocess.mark_process_dead(int(found[1]))  # type: ignore[no-untyped-call]


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Metrics:
    """Counts of one process.

    Args:
        registry: where they are kept; None = the one that /metrics shows.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
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

    def count_batch(self, users: int, probabilities: Mapping[str, Sequence[float]]) -> None:
        """Count a batch.

        Args:
            users: in it.
            probabilities: target -> of every user.
        """
        self._batch.observe(users)
        for name, values in probabilities.items():
            histogram = self._probability.labels(name)
            for value in values:
                histogram.observe(value)

    def show_model(self, digest: str, *, before: str | None = None) -> None:
        """Tell which model serves, and that another one no longer does."""
        if before is not None:
            self._model.labels(before).set(0)
        self._model.labels(digest).set(1)

    def count_swap(self, *, taken: bool) -> None:
        """Count a new model that was taken, or refused."""
        self._swaps.labels("taken" if taken else "refused").inc()


def count_request(route: str, status: int, seconds: float) -> None:
    """Count an answer.

    Args:
        route: one of the service's, not the path that was asked for.
        status: of HTTP.
        seconds: from the request to the end of its answer.
    """
    _REQUEST.labels(route, status).observe(seconds)


def describe() -> tuple[bytes, str]:
    """Return what Prometheus reads, and its media type.

    Where PROMETHEUS_MULTIPROC_DIR names a folder that several processes share, it tells of all.
    """
    registry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
