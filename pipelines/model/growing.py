"""Grows the trees that answer beside the networks, while these are trained."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.config import EnsembleTrees, Train
from pipelines.model.boosting import Rows, collect_rows, grow_trees, measure_moves
from pipelines.model.heads import Heads, Target
from pipelines.model.predictor import choose_device
from pipelines.model.schedule import Periods, Schedule, depends_on_weekday
from pipelines.model.timeline import DAY, Cuts, Timeline, population, spread
from pipelines.model.trees import Trees

_NICENESS: Final = 10  # of what runs beside the steps
_MOST_CUTS: Final = 400_000  # that tell corrections


class Grower:
    """Grows trees on what lies before the calibration cut, and before the first test cut.

    Beside the networks, where their steps leave a core idle.
    """

    def __init__(
        self,
        timeline: Timeline,
        periods: Periods,
        heads: Heads,
        targets: Sequence[Target],
        config: Train,
    ) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=_yield_to_others)
        self._growing: Future[Grown] | None = None
        self._grow: Callable[[], Grown] | None = None
        if not config.trees.rounds:
            return
        shortest = min(target.horizon_days for target in targets)
        weekly = depends_on_weekday(targets, periods)
        collect = partial(collect_rows, calendar=weekly)

        def look_back(close: int) -> Rows:
            last = max(periods.first, close - shortest * DAY)
            times = range(last, periods.first - 1, -shortest * DAY)
            cuts = Cuts.join([population(timeline, ts, periods.active_days) for ts in times])
            return collect(timeline, _thin(cuts, config.trees.max_rows), heads, close)

        held = _thin(calibration_cuts(timeline, periods, targets), config.trees.max_rows)
        # Here, not beside the networks: what a timeline remembers is not made for two threads.
        self._grow = partial(
            _grow,
            heads,
            look_back(periods.calibration),
            collect(timeline, held, heads, periods.test),
            look_back(periods.test),
            asked=np.isin(heads.grid, [target.horizon_days for target in targets]),
            step=shortest * DAY,
            config=config.trees,
            learning_rate=Schedule.of(config, timeline, periods.calibration).tree_rate,
            weekdays=weekly,
            half_life=config.half_life_days,
            seed=config.seed,
        )
        if choose_device(config.device).type != "cpu" or config.threads < (os.cpu_count() or 1):
            self._growing = self._pool.submit(self._grow)

    def __enter__(self) -> Grower:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> Grown | None:
        """Wait for what has grown; None where no trees are wanted."""
        if self._growing is not None:
            return self._growing.result()
        return self._grow() if self._grow is not None else None


@dataclass(frozen=True, kw_only=True)
class Grown:
    """Trees, and what they tell.

    Attributes:
        first: of events before the calibration cut.
        second: of events before the test cut.
        moves: (events, bins), how much the level of a window moves: see ``measure_moves``.
    """

    first: Trees
    second: Trees
    moves: NDArray[np.float64]


def _grow(
    heads: Heads,
    before: Rows,
    held: Rows,
    later: Rows,
    *,
    asked: NDArray[np.bool_],
    step: int,
    config: EnsembleTrees,
    learning_rate: float,
    weekdays: bool,
    half_life: float | None,
    seed: int,
) -> Grown:
    """Grow trees as ``grow_trees`` does, for the intervals that are asked about, (bins,)."""
    # Between the horizons nobody is asked; there ``join`` changes the network as at the next, and
    # the next horizon tells how much levels move.
    amounts = np.ones(len(heads.amounts), dtype=np.bool_)
    first, second = grow_trees(
        before,
        held,
        later,
        amounts=len(amounts),
        wanted=np.concatenate([*[asked] * len(heads.events), amounts]),
        config=config,
        learning_rate=learning_rate,
        period=step,
        weekdays=weekdays,
        half_life=half_life,
        seed=seed,
    )
    days = np.where(asked, np.array(heads.grid, dtype=np.float64), np.nan)
    every = np.concatenate([*[days] * len(heads.events), np.full(len(amounts), np.nan)])
    moves = measure_moves(before, first, every, step=step)[: len(every) - len(amounts)]
    places = np.flatnonzero(asked)
    following = places[np.searchsorted(places, np.arange(len(asked)))]
    return Grown(
        first=first, second=second, moves=moves.reshape(len(heads.events), -1)[:, following]
    )


def _yield_to_others() -> None:
    """Let this thread, and those it starts, run where others leave a core idle (on Linux)."""
    if sys.platform == "linux":
        this = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, this)
        os.setpriority(os.PRIO_PROCESS, this, max(now, _NICENESS))


def calibration_cuts(timeline: Timeline, periods: Periods, targets: Sequence[Target]) -> Cuts:
    """Return everyone in the population between the calibration and the test cut.

    One time a shortest horizon: all windows that close by the first test cut count, so that short
    horizons, of which several fit in, are corrected from more than one week's luck. Large shops and
    windows of very different length have more of them than tell anything, and are thinned.
    """
    shortest = min(target.horizon_days for target in targets)
    last = max(periods.calibration, periods.test - shortest * DAY)
    times = range(periods.calibration, last + 1, shortest * DAY)
    cuts = Cuts.join([population(timeline, ts, periods.active_days) for ts in times])
    return _thin(cuts, _MOST_CUTS)


def _thin(cuts: Cuts, most: int) -> Cuts:
    """Take so many of the cuts at most, evenly: features of all at once may not fit."""
    return cuts.take(spread(len(cuts), most))
