"""Corrects a fit by the calibration windows, and the level of the refit that follows it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Objective
from pipelines.model.boosting import TWEEDIE_POWER
from pipelines.model.calibration import (
    PRIOR_ROWS,
    Calibration,
    choose_threshold,
    fit_factor,
    fit_level,
    fit_probability,
)
from pipelines.model.heads import Heads, Target
from pipelines.model.predictor import Predictor, Raw, select
from pipelines.model.timeline import ANY_EVENT, DAY, Cuts, Labels, Timeline
from pipelines.model.trees import Mix

_FLOOR: Final = 1e-6  # of a probability in a loss
_LAST_STEPS: Final = 0.05  # of log odds, by which they leave the level too high or too low
_LEAST_SPREAD: Final = 1e-9  # of mean p(1 - p)
_SHARES: Final = np.linspace(0.0, 1.0, 21)  # of belief, tried
_DOUBT: Final = 0.5  # standard errors within which a share may be as good as the best


def calibrate(
    predictor: Predictor,
    timeline: Timeline,
    cuts: Cuts,
    close: int,
    said: Raw,
    scores: NDArray[np.float64],
    objective: Objective,
) -> Predictor:
    """Fit corrections and thresholds on the windows between the calibration and the test cut.

    Where there are trees, how much they are believed is chosen there before, by log loss over the
    closed horizons, for amounts by Tweedie deviance.

    Args:
        predictor: not calibrated.
        timeline: all events.
        cuts: everyone in the population between the two.
        close: the first test cut, microseconds; nothing at or after it is looked at.
        said, scores: of ``Predictor.parts`` at them; scores are not looked at without trees.
        objective: what thresholds are chosen by.
    """
    heads = predictor.spec.heads
    labels = timeline.labels(cuts, events=heads.events, horizons=heads.amounts, close=close)
    grid = np.array(heads.grid)
    closed = grid <= labels.observed_days[:, None]
    if len(predictor.trees):
        mix = _believe_events(predictor, said, scores, labels.delay, closed, cuts.user)
        predictor = predictor.beside(predictor.trees, mix)
    raw = predictor.join(said, scores)
    slope: dict[str, float] = {}
    shift: dict[str, list[float]] = {}
    for i, name in enumerate(heads.events):
        happened = labels.delay[:, i, None] < grid
        slope[name], shift[name] = fit_probability(1.0 - raw.survival[:, i], happened, closed)
    calibration = Calibration(slope=slope, shift=shift)
    if len(predictor.trees):
        predictor = predictor.calibrated(calibration, {})
        mix = _believe_amounts(predictor, raw, labels, closed, cuts.user)
        predictor = predictor.beside(predictor.trees, mix)
    expected = predictor.calibrated(calibration, {}).finish(raw)
    factor: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    for target in predictor.targets:
        known = closed[:, heads.grid.index(target.horizon_days)]
        values = expected[target.name][known].astype(np.float64)
        if target.kind == "binary":
            happened = _label(target, heads, labels)[known]
            thresholds[target.name] = choose_threshold(values, happened, objective)
            continue
        amount = labels.amount[known, heads.amounts.index(target.horizon_days)]
        factor[str(target.horizon_days)] = fit_factor(amount.astype(np.float64), values)
    return predictor.calibrated(Calibration(slope=slope, shift=shift, factor=factor), thresholds)


def _believe_events(
    predictor: Predictor,
    said: Raw,
    scores: NDArray[np.float64],
    delay: NDArray[np.float64],
    closed: NDArray[np.bool_],
    user: NDArray[np.int64],
) -> Mix:
    """Choose how much the network is believed of every event."""
    heads = predictor.spec.heads
    horizons = {target.horizon_days for target in predictor.targets}
    asked = [place for place, days in enumerate(heads.grid) if days in horizons]
    happened = delay[:, :, None] < np.array(heads.grid)[asked]
    losses = []
    for share in _SHARES:
        mix = Mix(events=dict.fromkeys(heads.events, float(share)))
        stays = predictor.beside(predictor.trees, mix).join(said, scores).survival
        stay = stays[:, :, asked].clip(_FLOOR, 1.0 - _FLOOR)
        loss = -np.log(np.where(happened, 1.0 - stay, stay))
        losses.append(np.where(closed[:, None, asked], loss, 0.0).sum(axis=2))
    by_share = np.stack(losses)
    return Mix(
        events={name: _settle(by_share[:, :, i], user) for i, name in enumerate(heads.events)}
    )


def _settle(losses: NDArray[np.float64], user: NDArray[np.int64]) -> float:
    """Choose the share nearest to one half that may be as good as the best.

    Weights fitted on little data often do worse than equal ones (Smith and Wallis, "A simple
    explanation of the forecast combination puzzle", 2009), so equal ones are left only for what
    lies beyond half a standard error (as Breiman et al. 1984 choose the size of a tree; half of one
    did a little better than a whole one on simulated shops and earlier folds of public logs).

    Args:
        losses: (shares, M).
        user: (M,), whose they are; a user's losses depend on each other.
    """
    best = int(losses.sum(axis=1).argmin())
    _, owner = np.unique(user, return_inverse=True)
    allowed = []
    for share, loss in zip(_SHARES, losses, strict=True):
        by_user = np.bincount(owner, loss - losses[best])
        if by_user.sum() <= _DOUBT * by_user.std() * math.sqrt(len(by_user)):
            allowed.append(float(share))
    return min(allowed, key=lambda share: abs(share - 0.5))


def _believe_amounts(
    predictor: Predictor,
    raw: Raw,
    labels: Labels,
    closed: NDArray[np.bool_],
    user: NDArray[np.int64],
) -> Mix:
    """Choose how much the network is believed of every amount; the events' shares stay."""
    heads, mix = predictor.spec.heads, predictor.spec.mix
    known = predictor.trees.known[len(heads.events) * len(heads.grid) :]
    amounts: dict[str, float] = {}
    for target in predictor.targets:
        if target.kind != "amount":
            continue
        place = heads.amounts.index(target.horizon_days)
        rows = closed[:, heads.grid.index(target.horizon_days)]
        actual = labels.amount[rows, place].astype(np.float64)
        if not known[place] or actual.sum() <= 0:
            continue
        losses = []
        for share in _SHARES:
            tried = replace(mix, amounts={str(target.horizon_days): float(share)})
            told = predictor.beside(predictor.trees, tried).finish(raw)[target.name][rows]
            expected = np.maximum(told.astype(np.float64), _FLOOR)
            # Totals are put right afterwards, as far as they are believed.
            losses.append(_deviance(actual, expected * fit_factor(actual, expected)))
        amounts[str(target.horizon_days)] = _settle(np.stack(losses), user[rows])
    return replace(mix, amounts=amounts)


def _deviance(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the Tweedie deviance of each row, up to what does not depend on the prediction."""
    power = TWEEDIE_POWER
    return np.asarray(
        expected ** (2 - power) / (2 - power) - actual * expected ** (1 - power) / (1 - power)
    )


def _label(target: Target, heads: Heads, labels: Labels) -> NDArray[np.bool_]:
    happened = labels.delay[:, heads.events.index(target.event or ANY_EVENT)] < target.horizon_days
    return happened if target.event is not None else ~happened


def doubt_level(
    heads: Heads,
    said: Raw,
    ts: NDArray[np.int64],
    begin: int,
    close: int,
    moves: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    """Say how far the level of the calibration windows may be from that of the next.

    Args:
        heads: what is predicted.
        said: of the first fit, uncalibrated, at the calibration windows.
        ts: (M,), microseconds, when each of them begins.
        begin, close: microseconds, when the first begins and the last is to have closed.
        moves: (events, bins), variances of log odds, by which the levels of windows differ.

    Returns:
        (events, bins), variances of log odds: of chance, and of windows that differ.
    """
    grid = np.array(heads.grid, dtype=np.float64)
    closed = grid <= (close - ts)[:, None] / DAY
    information = (said.survival * (1.0 - said.survival) * closed[:, None]).sum(axis=0)
    windows = np.maximum((close - begin) / DAY / grid, 1.0)
    return np.asarray(1.0 / (information + PRIOR_ROWS) + moves / windows)


def _between(
    own: NDArray[np.float64], theirs: NDArray[np.float64], doubt: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weigh two mean predictions of one event by their inverse variances.

    As a fixed-effect meta-analysis does. The last steps of a fit leave its own level off by some
    hundredths of log odds; by more, where the two are further apart than two standard deviations
    of the other.

    Args:
        own: (M, bins), P(event until the end of each interval).
        theirs: (M, bins), of the same rows.
        doubt: (bins,), variances of the level of theirs, squares of log odds.

    Returns:
        (bins,), means that grow with the interval.
    """
    mean = own.mean(axis=0)
    apart = theirs.mean(axis=0) - mean
    # To first order, the shift of the log odds of all that brings the one to the other.
    shift = apart / np.maximum((own * (1.0 - own)).mean(axis=0), _LEAST_SPREAD)
    last_steps = np.maximum(_LAST_STEPS**2, shift**2 - 4.0 * doubt)
    between = mean + apart * last_steps / (last_steps + doubt)
    return np.asarray(np.maximum.accumulate(between))


def correct_refit(
    predictor: Predictor, raw: Raw, first: Predictor, first_raw: Raw, doubt: NDArray[np.float64]
) -> Predictor:
    """Give a refitted model the corrections of the first fit, and a level between both.

    The last steps of a fit leave its predictions a few hundredths of log odds too high or too low,
    all shoppers alike. Of the first fit the calibration windows put that right; of the refit, which
    has learnt from them, they cannot tell as well. So its mean predictions there move towards those
    of the corrected first fit, as far as these windows are believed to tell the next; no outcome is
    looked at again.

    Args:
        predictor: refitted, not calibrated.
        raw: of some cuts.
        first: calibrated.
        first_raw: of the same cuts.
        doubt: (events, bins), variances of the level of the corrected first fit.
    """
    heads, calibration = predictor.spec.heads, first.spec.calibration
    if not len(raw.survival):
        return predictor.calibrated(calibration, first.spec.thresholds)
    expected = calibration.probability(heads.events, 1.0 - first_raw.survival)
    shift = {}
    for i, name in enumerate(heads.events):
        own = 1.0 - raw.survival[:, i]
        means = _between(own, expected[:, i], doubt[i])
        shift[name] = fit_level(own, means, calibration.slope[name])
    level = Calibration(slope=calibration.slope, shift=shift)
    told, wanted = predictor.calibrated(level, {}).finish(raw), first.finish(first_raw)
    factor = {}
    for target in select(predictor.targets, "amount"):
        total = float(told[target.name].sum(dtype=np.float64))
        ratio = float(wanted[target.name].sum(dtype=np.float64)) / total if total > 0 else 1.0
        factor[str(target.horizon_days)] = ratio
    return predictor.calibrated(replace(level, factor=factor), first.spec.thresholds)
