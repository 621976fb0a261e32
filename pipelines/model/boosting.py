"""Grows the trees that answer beside the network, with LightGBM.

One model for every event and horizon that is asked about (does the event happen until its end?),
and one for every amount. Rows are everyone in the population at equally spaced times of the past,
as in production; windows that close late count for the horizons that they allow alone.

They start from the level of each period (``levels`` says why), see when it was, so that they learn
what has changed, and ship as of the last time that they saw.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.config import EnsembleTrees, TreeSettings
from pipelines.model.calibration import sigmoid
from pipelines.model.heads import Heads
from pipelines.model.levels import measure_odds, shrink, tell_weekdays, weigh
from pipelines.model.timeline import DAY, Cuts, Ints, Labels, Timeline
from pipelines.model.tokens import encode_calendar
from pipelines.model.trees import Doubles, Trees

Kind = Literal["binary", "amount"]

# Between Poisson (1) and gamma (2): many zeros and a long tail.
TWEEDIE_POWER: Final = 1.4

_FEWEST: Final = 5  # rows of either outcome; fewer teach nothing
_MOVE_ROWS: Final = 50_000  # that tell how much levels move
_MAX_DEPTH: Final = 6  # every walk takes as many steps as the longest


def tree_parameters(kind: Kind, setting: TreeSettings, seed: int) -> dict[str, Any]:
    """Return LightGBM's parameters for one thread and equal results every time."""
    return {
        "objective": "binary" if kind == "binary" else "tweedie",
        "tweedie_variance_power": TWEEDIE_POWER,
        "learning_rate": setting.learning_rate,
        "num_leaves": setting.num_leaves,
        "min_child_samples": setting.min_child_samples,
        "feature_fraction": 0.6,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 1.0,
        "seed": seed,
        "deterministic": True,
        "num_threads": 1,
        # Of one thread it takes 8 to 17 % less time than by rows, for the same trees.
        "force_col_wise": True,
        "feature_pre_filter": False,
        "verbose": -1,
    }


@dataclass(frozen=True, kw_only=True)
class Rows:
    """M cuts with what is known of them.

    Attributes:
        x: float32 (M, F).
        y: float64 (M, O), outcomes; NaN where the window was not closed.
        ts: int64 (M,), microseconds, when each cut is.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float64]
    ts: NDArray[np.int64]


def collect_rows(
    timeline: Timeline, cuts: Cuts, heads: Heads, close: int, *, calendar: bool = False
) -> Rows:
    """Return features and outcomes of cuts.

    Args:
        timeline: all events.
        cuts: M cuts before ``close``.
        heads: what the outputs stand for.
        close: microseconds; nothing at or after it is looked at.
        calendar: hour and weekday are features, too.
    """
    x = timeline.features(cuts)
    if calendar:
        x = np.concatenate([x, encode_calendar(cuts.ts)], axis=1)
    labels = timeline.labels(cuts, events=heads.events, horizons=heads.amounts, close=close)
    return Rows(x=x, y=_outcomes(heads, labels), ts=cuts.ts)


def _outcomes(heads: Heads, labels: Labels) -> NDArray[np.float64]:
    """One column an output, in the order of ``Predictor``'s: events by intervals, amounts."""
    columns = []
    for event in range(len(heads.events)):
        for days in heads.grid:
            happened = (labels.delay[:, event] < days).astype(np.float64)
            columns.append(np.where(labels.observed_days >= days, happened, np.nan))
    for place, days in enumerate(heads.amounts):
        amount = np.maximum(labels.amount[:, place].astype(np.float64), 0.0)
        columns.append(np.where(labels.observed_days >= days, amount, np.nan))
    return np.stack(columns, axis=1)


def grow_trees(
    fit: Rows,
    stop: Rows,
    refit: Rows,
    *,
    amounts: int,
    wanted: NDArray[np.bool_],
    config: EnsembleTrees,
    learning_rate: float,
    period: int,
    weekdays: bool,
    half_life: float | None,
    seed: int,
) -> tuple[Trees, Trees]:
    """Grow the trees of some outputs, as many rounds as the later rows bear.

    Args:
        fit: of the first trees.
        stop: later; the round of least loss on them is the last.
        refit: of the second trees, which grow as many rounds.
        amounts: how many of the outputs, the last ones, are amounts.
        wanted: (O,), which outputs are to have trees.
        config: settings.
        learning_rate: of the trees.
        period: microseconds; the level of everyone within one is taken for one.
        weekdays: what a weekday does is for the trees to learn, and no part of a period's level.
        half_life: days after which the level of a period counts half for that which they ship with;
            None = all alike.
        seed: of the rows and features that each tree sees.

    Returns:
        The first and the second trees. Outputs of which too little is known have none, either.
    """
    import lightgbm as lgb

    outputs = fit.y.shape[1]
    shared = {"feature_pre_filter": False, "num_threads": 1, "verbose": -1}
    setting = TreeSettings(
        learning_rate=learning_rate,
        num_leaves=config.num_leaves,
        min_child_samples=config.min_child_samples,
    )
    # Binned once; every output takes the rows of which it knows.
    fit_data = lgb.Dataset(_tell_time(fit), params=shared).construct()
    stop_data = fit_data.create_valid(_tell_time(stop), params=shared).construct()
    refit_data = lgb.Dataset(_tell_time(refit), params=shared).construct()
    time = fit.x.shape[1]  # its place among the features

    def grow(output: int) -> tuple[list[Any], ...]:
        kind: Kind = "binary" if output < outputs - amounts else "amount"
        known = all(_tells(rows.y[:, output]) for rows in (fit, stop, refit))
        if not (wanted[output] and known):
            return [], []
        parameters = tree_parameters(kind, setting, seed) | {"max_depth": _MAX_DEPTH}
        choose = partial(
            _choose,
            output=output,
            kind=kind,
            period=period,
            weekdays=weekdays,
            half_life=half_life,
        )
        part, level = choose(fit_data, fit)
        held, _ = choose(stop_data, stop)
        later, later_level = choose(refit_data, refit)
        first = lgb.train(
            parameters,
            part,
            num_boost_round=config.rounds,
            valid_sets=[held],
            callbacks=[lgb.early_stopping(config.early_stopping, verbose=False)],
        )
        rounds = max(first.best_iteration, 1)
        second = lgb.train(parameters, later, num_boost_round=rounds)
        return tuple(
            # A tree of one leaf says the level of everybody.
            [{"leaf_value": start}]
            + [
                _take_latest(tree["tree_structure"], time)
                for tree in model.dump_model(num_iteration=rounds)["tree_info"]
            ]
            for model, start in ((first, level), (second, later_level))
        )

    # Trees of small data gain little from threads of their own; outputs side by side do.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        grown = list(pool.map(grow, range(outputs)))
    return flatten([first for first, _ in grown]), flatten([second for _, second in grown])


def measure_moves(
    rows: Rows, trees: Trees, days: NDArray[np.float64], *, step: int
) -> NDArray[np.float64]:
    """Say how much the level of a window differs from that of the next, beyond chance.

    Of every time: how far the log odds of its rows are from what the trees, which have seen them,
    say, to first order. Half the mean square of the difference between two times that are as far
    apart as the window is long, less what chance makes of it (the semivariogram at that lag:
    Matheron, Economic Geology 58, 1963).

    Args:
        rows: everyone in the population at equally spaced times.
        trees: grown on them.
        days: (O,), length of the window of each output; NaN = not asked about.
        step: microseconds between the times.

    Returns:
        (O,), variances of log odds, at least 0; 0 where nothing is known, or not asked about.
    """
    chosen = np.unique(np.linspace(0, len(rows.ts) - 1, min(len(rows.ts), _MOVE_ROWS)).astype(int))
    moves = np.zeros(len(days))
    if not len(chosen):
        return moves
    place = (rows.ts[chosen] - rows.ts.min()) // step
    said = sigmoid(trees.score(rows.x[chosen]))
    for output in np.flatnonzero(trees.known & np.isfinite(days)):
        known = np.isfinite(rows.y[chosen, output])
        if not known.any():
            continue
        p, y, when = said[known, output], rows.y[chosen, output][known], place[known]
        weight = np.bincount(when, p * (1 - p))
        seen = weight > 0
        inverse = np.divide(1.0, weight, out=np.zeros_like(weight), where=seen)
        level = np.bincount(when, y - p) * inverse
        lag = math.ceil(days[output] * DAY / step)  # no nearer: windows that overlap differ less
        both = seen[lag:] & seen[:-lag]
        if both.any():
            square = (level[lag:] - level[:-lag]) ** 2 - inverse[lag:] - inverse[:-lag]
            moves[output] = max(0.0, float(square[both].mean()) / 2)
    return moves


def _tells(y: NDArray[np.float64]) -> bool:
    """Are there enough rows of both outcomes?"""
    positives = int((y > 0).sum())
    return min(positives, int((y == 0).sum())) >= _FEWEST


def _measure_levels(
    rows: Rows, output: int, kind: Kind, period: int
) -> tuple[Doubles, Doubles, Ints]:
    """Return the level of an outcome, log odds or the log of an amount, in every period.

    Returns:
        (T,) levels, the latest first; (T,) inverse variances of chance, for amounts as many as the
        buyers would be if all spent alike (Kish, "Survey sampling", 1965); and for the rows of
        which the outcome is known how many periods ago they are, (R,).
    """
    known = np.isfinite(rows.y[:, output])
    y = rows.y[known, output]
    ago = (rows.ts.max() - rows.ts[known]) // period
    n, total = np.bincount(ago), np.bincount(ago, y)
    if kind == "binary":
        return *measure_odds(total, n), ago
    square = np.bincount(ago, np.square(y))
    information = np.divide(np.square(total), square, out=np.zeros(len(n)), where=square > 0)
    return np.log(np.where(total > 0, total, 1.0) / np.maximum(n, 1)), information, ago


def _tell_time(rows: Rows) -> NDArray[np.float32]:
    """Return the features with the time beside them, in days, (M, F + 1)."""
    return np.concatenate([rows.x, (rows.ts / DAY)[:, None].astype(np.float32)], axis=1)


def _take_latest(node: dict[str, Any], time: int) -> dict[str, Any]:
    """Return a tree as it is after all times that it knows: without the splits by time."""
    while node.get("split_feature") == time:
        node = node["right_child"]
    if "left_child" not in node:
        return node
    below = {key: _take_latest(node[key], time) for key in ("left_child", "right_child")}
    return node | below


def _choose(
    data: Any,
    rows: Rows,
    *,
    output: int,
    kind: Kind,
    period: int,
    weekdays: bool,
    half_life: float | None,
) -> tuple[Any, float]:
    """Return the part of a LightGBM data set of which one outcome is known, and its late level.

    Trees of the part start from the level of each period.
    """
    known = np.flatnonzero(np.isfinite(rows.y[:, output]))
    part = label_part(data, known, rows.y[known, output])
    level, information, ago = _measure_levels(rows, output, kind, period)
    before = np.arange(len(level)) * period
    if weekdays:
        level = level - tell_weekdays(level, information, (rows.ts.max() - before) // DAY % 7)
    level = shrink(level, information)
    part.set_init_score(level[ago])
    return part, float(weigh(level, information, before / DAY, half_life))


def label_part(data: Any, rows: NDArray[np.int64], y: NDArray[np.float64]) -> Any:
    """Return some rows of a LightGBM data set, binned as they are there, with labels of their own.

    Args:
        data: constructed; not changed, so that several threads may ask at a time.
        rows: (R,), numbers of its rows.
        y: (R,).
    """
    part = data.subset(rows, params=dict(data.params)).construct()
    part.set_label(y)
    return part


def flatten(dumps: Sequence[Sequence[dict[str, Any]]]) -> Trees:
    """Build arrays from LightGBM's own description of its trees, by output.

    Args:
        dumps: for every output each ``tree_structure`` of ``Booster.dump_model``.
    """
    nodes: list[tuple[int, float, int, float]] = []
    output, root = [], []
    for place, trees in enumerate(dumps):
        for tree in trees:
            output.append(place)
            root.append(len(nodes))
            _lay_out(tree, nodes)
    feature, threshold, child, value = zip(*nodes, strict=True) if nodes else ((), (), (), ())
    return Trees(
        outputs=len(dumps),
        output=np.array(output, dtype=np.int32),
        root=np.array(root, dtype=np.int32),
        feature=np.array(feature, dtype=np.int32),
        threshold=_round_down(np.array(threshold, dtype=np.float64)),
        child=np.array(child, dtype=np.int32),
        value=np.array(value, dtype=np.float64),
    )


def _lay_out(top: dict[str, Any], nodes: list[tuple[int, float, int, float]]) -> None:
    """Append the nodes of one tree, level by level, so that siblings are neighbours."""
    begin = len(nodes)
    queue = [top]
    for place, node in enumerate(queue):  # grows while it is walked
        value, _ = _mean(node)
        if "left_child" not in node:
            nodes.append((0, np.inf, begin + place, value))
            continue
        nodes.append((node["split_feature"], node["threshold"], begin + len(queue), value))
        queue += [node["left_child"], node["right_child"]]


def _mean(node: dict[str, Any]) -> tuple[float, float]:
    """Mean of a node's leaves, and how many rows it was grown on."""
    if "left_child" not in node:
        return float(node["leaf_value"]), float(node.get("leaf_count", 1))
    (a, n), (b, m) = _mean(node["left_child"]), _mean(node["right_child"])
    return (a * n + b * m) / max(n + m, 1.0), n + m


def _round_down(threshold: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the greatest float32 at or below: features, which are float32, compare the same."""
    near = threshold.astype(np.float32)
    return np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near)
