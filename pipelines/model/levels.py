"""How the level of an outcome moves from time to time, told from chance.

A shop has better and worse weeks. What learns from many of them, and knows nothing of that, takes
whatever tells the weeks apart, such as how long ago a shopper came, for a sign of who buys. So it
starts from the level of each time (fixed effects of periods: Mundlak, Econometrica 46, 1978), as
far as that is more than chance (DerSimonian and Laird, Controlled Clinical Trials 7, 1986), and,
where that is to be learnt, not its weekday's.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.model.calibration import Doubles, log_odds

_HALF: Final = 0.5  # of an event more, so that a rate of 0 has log odds
_WEEK: Final = 7


def measure_odds(happened: NDArray[Any], counted: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Return log odds and their inverse variances n p (1 - p), both of the shape of the counts.

    Args:
        happened: how often something happened.
        counted: how often it could.
    """
    p = (happened + _HALF) / (counted + 2 * _HALF)
    return log_odds(p), counted * p * (1.0 - p)


def shrink(level: Doubles, information: Doubles) -> Doubles:
    """Return what is to be believed of the levels of T times, (T, ...).

    Each is drawn to the mean, as much as chance makes of its distance.

    Args:
        level: (T, ...), as measured.
        information: (T, ...), inverse variances of chance; 0 = nothing is known.
    """
    total = information.sum(axis=0)
    mean = _mean(level, information)
    surplus = (information * np.square(level - mean)).sum(axis=0)
    surplus -= np.count_nonzero(information, axis=0) - 1
    scale = total - _divide(np.square(information).sum(axis=0), total)
    variance = np.maximum(_divide(surplus, scale), 0.0)
    share = information * variance / (information * variance + 1.0)
    return np.asarray(mean + share * (level - mean))


def tell_weekdays(level: Doubles, information: Doubles, weekday: NDArray[np.int64]) -> Doubles:
    """Return how much of the levels of T equally spaced times is their weekday's, (T,).

    How far those of a weekday are from the mean of the seven times around each, the nearest seven
    at the ends, which hold every weekday once where times are no whole weeks apart (Persons,
    Review of Economic Statistics 1, 1919). Of fewer than seven times, nothing but the mean stays.

    Args:
        level: (T,), as measured.
        information: (T,), inverse variances of chance; 0 = nothing is known.
        weekday: (T,), 0 to 6.
    """
    first = np.clip(np.arange(len(level)) - _WEEK // 2, 0, max(len(level) - _WEEK, 0))
    last = np.minimum(first + _WEEK, len(level))

    def add(values: Doubles) -> Doubles:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(total[last] - total[first])

    apart = level - _divide(add(information * level), add(information))
    known = np.bincount(weekday, information, _WEEK)
    return _divide(np.bincount(weekday, information * apart, _WEEK), known)[weekday]


def weigh(
    level: Doubles, information: Doubles, age_days: Doubles, half_life: float | None
) -> Doubles:
    """Return the mean of levels over T times, old ones counting less, (...).

    Args:
        level: (T, ...), as believed.
        information: (T, ...), inverse variances of chance.
        age_days: (T,).
        half_life: days after which a time counts half; None = all alike.
    """
    weight = 0.5 ** (age_days / half_life) if half_life else np.ones(len(age_days))
    return _mean(level, information * weight.reshape(-1, *[1] * (level.ndim - 1)))


def _mean(value: Doubles, weight: Doubles) -> Doubles:
    return _divide((weight * value).sum(axis=0), weight.sum(axis=0))


def _divide(a: Any, b: Any) -> Doubles:
    """Divide; 0 where that cannot be done."""
    return np.asarray(np.divide(a, b, out=np.zeros(np.shape(b)), where=np.asarray(b) > 0))
