"""When a fit may look, how often it reads the log, and how fast it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipelines.config import Train
from pipelines.model.heads import Target
from pipelines.model.timeline import DAY, Timeline

_WEEKS: Final = 4  # that tell one weekday from another
_READ: Final = 2_200_000  # events, over all epochs
_FEWEST, _MOST = 3, 6  # epochs
_FASTEST, _SLOWEST = 0.006, 0.002  # learning rates of the fewest and the most
_MOST_PLACES, _FEWEST_PLACES = 2048, 512  # of a batch
_STEPS: Final = 32  # of an epoch, from events alone
_TREE_RATE, _SLOW_TREE_RATE = 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class Periods:
    """Times that bound what each fit may see, microseconds since the epoch.

    Attributes:
        first: no training cut is before.
        calibration: the calibration cut; windows of the first fit close before it.
        test: the first test cut; windows of the refit close before it.
        active_days: who is in the population at a cut; None = everyone seen so far.
    """

    first: int
    calibration: int
    test: int
    active_days: float | None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often a fit reads the log, and how fast it learns.

    Where the settings leave it open: epochs until 2.2 million events have been read, three at
    least and six at most, and a rate that falls evenly from .006 with three to .002 with six. A
    large log is read fewer times in larger steps, to which a sparse one would be fitted too
    closely. Batches have 2,048 places, half as many where there are less than 65,536 events, and a
    quarter below 32,768, so that an epoch has steps enough. Of a log that is read six times the
    trees beside the network learn at .01 instead of .1 (all measured in benchmarks/TRIED.md).

    Attributes:
        epochs: of the first fit.
        learning_rate: at its highest.
        tokens_per_batch: places of a batch.
        tree_rate: learning rate of the trees.
    """

    epochs: int
    learning_rate: float
    tokens_per_batch: int
    tree_rate: float

    @classmethod
    def of(cls, config: Train, timeline: Timeline, close: int) -> Schedule:
        """Choose for the events before ``close``, microseconds."""
        events = max(1, int((timeline.ts < close).sum()))
        enough = min(max(round(_READ / events), _FEWEST), _MOST)
        epochs = config.epochs or enough
        between = np.interp(epochs, (_FEWEST, _MOST), (_FASTEST, _SLOWEST))
        places = _MOST_PLACES
        while places > _FEWEST_PLACES and events < _STEPS * places:
            places //= 2
        return cls(
            epochs=epochs,
            learning_rate=config.learning_rate or float(between),
            tokens_per_batch=config.tokens_per_batch or places,
            tree_rate=config.trees.learning_rate
            or (_SLOW_TREE_RATE if enough == _MOST else _TREE_RATE),
        )


def depends_on_weekday(targets: Sequence[Target], periods: Periods) -> bool:
    """Is it another question on another weekday, and is the log long enough to tell?

    Windows of whole weeks hold each weekday equally often, so that nothing is to be learnt.
    """
    weeks = (periods.calibration - periods.first) / (7 * DAY)
    return weeks >= _WEEKS and any(target.horizon_days % 7 for target in targets)
