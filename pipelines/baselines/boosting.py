"""LightGBM on the snapshot features: what a team would use instead."""

from __future__ import annotations

from typing import Any, Final

import lightgbm as lgb
import numpy as np

from pipelines.config import Baselines, TreeSettings
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, SnapshotTable

# Between Poisson (1) and gamma (2): many zeros and a long tail.
_TWEEDIE_POWER = 1.4

# Of every call: LightGBM keeps one count of threads for the whole process. A call that names none
# raises it under the trees that another thread grows, whose buffers are for one (a crash).
_THREADS: Final = {"num_threads": 1}


class Boosting:
    """Gradient boosted trees for all targets of one snapshot table.

    The rows are binned once and shared by all targets. The settings of the trees and the rounds
    (by early stopping) are those of the least loss on the calibration cut, chosen target by
    target; the refit on everything closed before the test cuts uses them.
    One object is for one thread.
    """

    def __init__(self, table: SnapshotTable, config: Baselines) -> None:
        self._table = table
        self._config = config
        self._train = table.rows_of(Split.TRAIN)
        self._calibration = table.rows_of(Split.CALIBRATION)
        self._test = table.rows_of(Split.TEST)
        self._known = self._train | self._calibration
        parameters = {"feature_pre_filter": False, "verbose": -1} | _THREADS
        x, names = table.features, table.feature_names
        self._fit_data = lgb.Dataset(
            x[self._train], feature_name=names, params=parameters, free_raw_data=False
        ).construct()
        self._stop_data = self._fit_data.create_valid(
            x[self._calibration], params=parameters
        ).construct()
        self._refit_data = lgb.Dataset(
            x[self._known], feature_name=names, params=parameters, free_raw_data=False
        ).construct()

    def fit_target(self, target: Target) -> tuple[Floats, str]:
        """Fit one target twice.

        Returns:
            Predictions for the calibration and test rows, and the refitted model as text.
        """
        y = self._table.labels[target.name]
        self._fit_data.set_label(y[self._train])
        self._stop_data.set_label(y[self._calibration])
        trials = [self._try(target.kind, setting) for setting in self._list_settings()]
        # Of equals the first.
        _loss, setting, first = min(trials, key=lambda trial: trial[0])
        self._refit_data.set_label(y[self._known])
        second = lgb.train(
            self._parameters(target.kind, setting),
            self._refit_data,
            num_boost_round=max(first.best_iteration, 1),
        )
        x = self._table.features
        predictions = np.empty(len(y))
        predictions[self._calibration] = first.predict(x[self._calibration], **_THREADS)
        predictions[self._test] = second.predict(x[self._test], **_THREADS)
        return predictions[self._calibration | self._test], second.model_to_string()

    def _list_settings(self) -> list[TreeSettings]:
        config = self._config.lightgbm
        own = TreeSettings(
            learning_rate=config.learning_rate,
            num_leaves=config.num_leaves,
            min_child_samples=config.min_child_samples,
        )
        return [own, *config.search]

    def _try(self, kind: Kind, setting: TreeSettings) -> tuple[float, TreeSettings, Any]:
        """Fit on the training cuts: least loss on the calibration cut, setting, trees."""
        config = self._config.lightgbm
        model = lgb.train(
            self._parameters(kind, setting),
            self._fit_data,
            num_boost_round=config.rounds,
            valid_sets=[self._stop_data],
            callbacks=[lgb.early_stopping(config.early_stopping, verbose=False)],
        )
        (loss,) = model.best_score["valid_0"].values()
        return float(loss), setting, model

    def _parameters(self, kind: Kind, setting: TreeSettings) -> dict[str, Any]:
        return {
            "objective": "binary" if kind is Kind.BINARY else "tweedie",
            "tweedie_variance_power": _TWEEDIE_POWER,
            **setting.model_dump(),
            "feature_fraction": 0.6,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": 1.0,
            "seed": self._config.seed,
            "deterministic": True,
            **_THREADS,
            "force_row_wise": True,
            "feature_pre_filter": False,
            "verbose": -1,
        }
