"""LightGBM on the snapshot features: what a team would use instead."""

from __future__ import annotations

from typing import Any, Final

import lightgbm as lgb
import numpy as np

from pipelines.config import Baselines, TreeSettings
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, SnapshotTable
from pipelines.model.boosting import tree_parameters

# Of every call: LightGBM keeps one count of threads for the whole process. A call that names none
# raises it under the trees that another thread grows, whose buffers are for one (a crash).
_THREADS: Final = {"num_threads": 1}


class _Rows:
    """What the trees of one horizon learn from, binned once for all of its targets.

    Attributes:
        fit: (R,) rows of the first fit: what closed by the calibration cut.
        refit: (R,) rows of the second: what closed by the first test cut.
        fit_data, stop_data, refit_data: the same and the calibration cut, without labels.
    """

    def __init__(self, table: SnapshotTable, horizon_days: int) -> None:
        self.fit = table.closed_rows(horizon_days, Split.CALIBRATION)
        self.refit = table.closed_rows(horizon_days, Split.TEST)
        parameters = {"feature_pre_filter": False, "verbose": -1} | _THREADS
        x, names = table.features, table.feature_names
        self.fit_data, self.refit_data = (
            lgb.Dataset(
                x[rows], feature_name=names, params=parameters, free_raw_data=False
            ).construct()
            for rows in (self.fit, self.refit)
        )
        self.stop_data = self.fit_data.create_valid(
            x[table.rows_of(Split.CALIBRATION)], params=parameters
        ).construct()


class Boosting:
    """Gradient boosted trees for all targets of one snapshot table.

    The rows are binned once a horizon and shared by its targets, which are best fitted one after
    the other: only the last horizon is kept. The settings of the trees and the rounds
    (by early stopping) are those of the least loss on the calibration cut, chosen target by
    target; the refit on everything closed before the test cuts uses them.
    One object is for one thread.
    """

    def __init__(self, table: SnapshotTable, config: Baselines) -> None:
        self._table = table
        self._config = config
        self._calibration = table.rows_of(Split.CALIBRATION)
        self._test = table.rows_of(Split.TEST)
        self._horizon_days = 0
        self._rows: _Rows | None = None

    def fit_target(self, target: Target) -> tuple[Floats, str]:
        """Fit one target twice.

        Returns:
            Predictions for the calibration and test rows, and the refitted model as text.
        """
        y = self._table.labels[target.name]
        rows = self._bin(target.horizon_days)
        rows.fit_data.set_label(y[rows.fit])
        rows.stop_data.set_label(y[self._calibration])
        trials = [self._try(target.kind, setting, rows) for setting in self._list_settings()]
        # Of equals the first.
        _loss, setting, first = min(trials, key=lambda trial: trial[0])
        rows.refit_data.set_label(y[rows.refit])
        second = lgb.train(
            tree_parameters(target.kind.value, setting, self._config.seed),
            rows.refit_data,
            num_boost_round=max(first.best_iteration, 1),
        )
        x = self._table.features
        predictions = np.empty(len(y))
        predictions[self._calibration] = first.predict(x[self._calibration], **_THREADS)
        predictions[self._test] = second.predict(x[self._test], **_THREADS)
        return predictions[self._calibration | self._test], second.model_to_string()

    def _bin(self, horizon_days: int) -> _Rows:
        """Return the rows of a horizon: those at hand, or others in their place."""
        if self._rows is None or self._horizon_days != horizon_days:
            self._rows = None  # not both at a time
            self._rows, self._horizon_days = _Rows(self._table, horizon_days), horizon_days
        return self._rows

    def _list_settings(self) -> list[TreeSettings]:
        config = self._config.lightgbm
        own = TreeSettings(
            learning_rate=config.learning_rate,
            num_leaves=config.num_leaves,
            min_child_samples=config.min_child_samples,
        )
        return [own, *config.search]

    def _try(
        self, kind: Kind, setting: TreeSettings, rows: _Rows
    ) -> tuple[float, TreeSettings, Any]:
        """Fit before the calibration cut: least loss on that cut, setting, trees."""
        config = self._config.lightgbm
        model = lgb.train(
            tree_parameters(kind.value, setting, self._config.seed),
            rows.fit_data,
            num_boost_round=config.rounds,
            valid_sets=[rows.stop_data],
            callbacks=[lgb.early_stopping(config.early_stopping, verbose=False)],
        )
        (loss,) = model.best_score["valid_0"].values()
        return float(loss), setting, model
