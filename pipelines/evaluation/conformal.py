"""Prediction sets of a binary target that hold the truth as often as promised.

Class-conditional split conformal prediction (Vovk, "Conditional validity of inductive conformal
predictors", ACML 2012): on the calibration cut, the scores of those who did it and of those who
did not each give a bound; a test row's set holds every answer whose score is inside. For rows
exchangeable with the calibration rows, each of the two groups is covered with at least the level
asked for. Shoppers change with time, and the scores of the test rows are by the refit, those of the
calibration rows by the fit before it, which was corrected on them: so the observed coverage is told
beside the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.metrics import Floats, clean


@dataclass(frozen=True, kw_only=True)
class PredictionSets:
    """Which answers remain possible for N rows.

    Attributes:
        level: share of rows of either group whose set is to hold the truth.
        yes, no: bool (N,), whether the set holds the answer.
    """

    level: float
    yes: NDArray[np.bool_]
    no: NDArray[np.bool_]

    def describe(self, y: Floats) -> dict[str, Any]:
        """Return observed coverage, in all and by group, and how many rows are decided.

        Args:
            y: (N,) 0/1 outcomes.
        """
        happened = y > 0
        covered = np.where(happened, self.yes, self.no)
        return {
            "level": self.level,
            "coverage": _share(covered),
            "coverage_of_positives": _share(covered[happened]),
            "coverage_of_negatives": _share(covered[~happened]),
            "only_yes": _share(self.yes & ~self.no),
            "only_no": _share(self.no & ~self.yes),
            "both": _share(self.yes & self.no),
        }


def make_sets(
    known_y: Floats, known_p: Floats, p: Floats, *, level: float
) -> PredictionSets | None:
    """Make prediction sets.

    Args:
        known_y, known_p: (C,) outcomes and probabilities of the calibration rows.
        p: (N,) probabilities of the rows to decide.
        level: wanted coverage of either group.

    Returns:
        The sets; None where the calibration rows hold one outcome only or have no prediction.
    """
    happened = known_y > 0
    if not happened.any() or happened.all() or not np.isfinite(known_p).all():
        return None
    return PredictionSets(
        level=level,
        yes=1 - p <= _bound(1 - known_p[happened], level),
        no=p <= _bound(known_p[~happened], level),
    )


def _bound(scores: Floats, level: float) -> float:
    """Smallest score that covers a new row of the group with the level's chance."""
    rank = math.ceil((len(scores) + 1) * level)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def _share(rows: NDArray[np.bool_]) -> float | None:
    return clean(float(rows.mean())) if len(rows) else None
