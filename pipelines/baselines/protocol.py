"""How every baseline is fitted, so that the comparison with the model is fair.

The first fit sees every window that closed by the calibration cut and predicts that cut, whose
labels may choose (a number of rounds, a threshold). The second fit, with what was chosen, sees
every window that closed by the first test cut, and predicts the test cuts. Nothing sees past its
cut, and a short horizon is learnt up to newer cuts than a long one, as the model learns it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pipelines.features.cuts import Split
from pipelines.features.labels import Target
from pipelines.features.snapshot_table import Floats, SnapshotTable


class Baseline(Protocol):
    """A model of one target on snapshot features."""

    def fit(self, x: Floats, y: Floats) -> None:
        """Fit on (R, F) features and (R,) labels."""

    def predict(self, x: Floats) -> Floats:
        """Predict (R,) probabilities or amounts."""


def fit_twice(table: SnapshotTable, target: Target, first: Baseline, second: Baseline) -> Floats:
    """Predict the calibration rows from the first fit and the test rows from the second.

    Args:
        table: all snapshots.
        target: whose labels.
        first: fitted on what closed by the calibration cut.
        second: fitted on what closed by the first test cut.

    Returns:
        Predictions for the calibration and test rows, in the order of the table.
    """
    y = table.labels[target.name]
    train = table.closed_rows(target.horizon_days, Split.CALIBRATION)
    known = table.closed_rows(target.horizon_days, Split.TEST)
    calibration, test = table.rows_of(Split.CALIBRATION), table.rows_of(Split.TEST)
    first.fit(table.features[train], y[train])
    second.fit(table.features[known], y[known])
    predictions = np.empty(len(y))
    predictions[calibration] = first.predict(table.features[calibration])
    predictions[test] = second.predict(table.features[test])
    return predictions[calibration | test]
