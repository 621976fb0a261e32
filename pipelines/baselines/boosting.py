"""LightGBM on the snapshot features: what a team would use instead."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

import lightgbm as lgb
import numpy as np

from pipelines.config import Baselines, TreeSettings
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, Mask, SnapshotTable
from pipelines.model.boosting import label_part, tree_parameters

# Of every call: LightGBM keeps one count of threads for the whole process. A call that names none
# raises it under the trees that another thread grows, whose buffers are for one (a crash).
_THREADS: Final = {"num_threads": 1}


@dataclass(frozen=True, kw_only=True)
class _Binned:
    """What the trees of one horizon learn from, for all of its targets.

    Attributes:
        fit: (R,) rows of the first fit: what closed by the calibration cut.
        refit: (R,) rows of the second: what closed by the first test cut.
        fit_data, stop_data, refit_data: the same and the calibration cut, without labels.
    """

    fit: Mask
    refit: Mask
    fit_data: Any
    stop_data: Any
    refit_data: Any


class Boosting:
    """Gradient boosted trees for all targets of one snapshot table; threads may share it.

    The rows are binned once a horizon. The settings of the trees and the rounds (by early
    stopping) are those of the least loss on the calibration cut, chosen target by target; the
    refit on everything closed before the test cuts uses them.
    """

    def __init__(self, table: SnapshotTable, config: Baselines) -> None:
        self._table = table
        self._config = config
        self._calibration = table.rows_of(Split.CALIBRATION)
        self._test = table.rows_of(Split.TEST)
        self._binned: dict[int, _Binned] = {}
        self._binning = threading.Lock()

    def fit_target(self, target: Target) -> tuple[Floats, str]:
        """Fit one target twice.

        Returns:
            Predictions for the calibration and test rows, and the refitted model as text.
        """
        y = self._table.labels[target.name]
        rows = self._bin(target.horizon_days)
        fit, stop, refit = (
            label_part(data, np.arange(mask.sum()), y[mask])
            for data, mask in (
                (rows.fit_data, rows.fit),
                (rows.stop_data, self._calibration),
                (rows.refit_data, rows.refit),
            )
        )
        trials = [self._try(target.kind, setting, fit, stop) for setting in self._list_settings()]
        # Of equals the first.
        _loss, setting, first = min(trials, key=lambda trial: trial[0])
        second = lgb.train(
            tree_parameters(target.kind.value, setting, self._config.seed),
            refit,
            num_boost_round=max(first.best_iteration, 1),
        )
        x = self._table.features
        predictions = np.empty(len(y))
        predictions[self._calibration] = first.predict(x[self._calibration], **_THREADS)
        predictions[self._test] = second.predict(x[self._test], **_THREADS)
        return predictions[self._calibration | self._test], second.model_to_string()

    def _bin(self, horizon_days: int) -> _Binned:
        """Return the rows of a horizon, binned by whoever asks first."""
        with self._binning:
            if horizon_days not in self._binned:
                self._binned[horizon_days] = self._bin_anew(horizon_days)
            return self._binned[horizon_days]

    def _bin_anew(self, horizon_days: int) -> _Binned:
        table = self._table
        fit = table.closed_rows(horizon_days, Split.CALIBRATION)
        refit = table.closed_rows(horizon_days, Split.TEST)
        parameters = {"feature_pre_filter": False, "verbose": -1} | _THREADS
        x, names = table.features, table.feature_names
        fit_data, refit_data = (
            lgb.Dataset(x[rows], feature_name=names, params=parameters).construct()
            for rows in (fit, refit)
        )
        stop_data = fit_data.create_valid(x[self._calibration], params=parameters).construct()
        return _Binned(
            fit=fit, refit=refit, fit_data=fit_data, stop_data=stop_data, refit_data=refit_data
        )

    def _list_settings(self) -> list[TreeSettings]:
        config = self._config.lightgbm
        own = TreeSettings(
            learning_rate=config.learning_rate,
            num_leaves=config.num_leaves,
            min_child_samples=config.min_child_samples,
        )
        return [own, *config.search]

    def _try(
        self, kind: Kind, setting: TreeSettings, fit: Any, stop: Any
    ) -> tuple[float, TreeSettings, Any]:
        """Fit before the calibration cut: least loss on that cut, setting, trees."""
        config = self._config.lightgbm
        model = lgb.train(
            tree_parameters(kind.value, setting, self._config.seed),
            fit,
            num_boost_round=config.rounds,
            valid_sets=[stop],
            callbacks=[lgb.early_stopping(config.early_stopping, verbose=False)],
        )
        (loss,) = model.best_score["valid_0"].values()
        return float(loss), setting, model
