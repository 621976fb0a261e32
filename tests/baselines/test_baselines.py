from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from pipelines.baselines import linear
from pipelines.baselines.boosting import Boosting
from pipelines.baselines.linear import Linear, Scaling, scale
from pipelines.baselines.protocol import fit_twice
from pipelines.baselines.simple import Majority, Recency
from pipelines.config import Baselines, LightGBMConfig, TreeSettings
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import Floats, SnapshotTable

BUY = Target(name="purchase_14d", kind=Kind.BINARY, event="purchase", horizon_days=14)
SPEND = Target(name="spend_14d", kind=Kind.AMOUNT, event=None, horizon_days=14)


def make_table(seed: int = 0, users: int = 1500) -> SnapshotTable:
    random = np.random.default_rng(seed)
    rows = 4 * users
    recency = random.exponential(10, rows)
    recency[random.random(rows) < 0.2] = np.nan
    views = random.poisson(4, rows).astype(float)
    noise = random.normal(size=rows)
    odds = -1.5 - 0.1 * np.nan_to_num(recency, nan=30) + 0.4 * views
    y = (random.random(rows) < 1 / (1 + np.exp(-odds))).astype(float)
    return SnapshotTable(
        user=np.tile(np.arange(users, dtype=np.int32), 4),
        cut=np.repeat(np.arange(4, dtype=np.int32), users),
        features=np.column_stack([recency, views, noise]),
        feature_names=["f_recency_purchase", "f_views", "f_noise"],
        labels={BUY.name: y, SPEND.name: y * random.gamma(2, 10, rows)},
        targets=(BUY, SPEND),
        omitted=[],
        splits={0: Split.TRAIN, 1: Split.TRAIN, 2: Split.CALIBRATION, 3: Split.TEST},
        cut_times={k: f"2025-0{k + 1}-01" for k in range(4)},
    )


# Days after the first of weekly cuts of horizons of one and two weeks.
WEEKLY = {
    0: Split.TRAIN,
    7: Split.TRAIN,
    14: Split.BETWEEN,
    21: Split.CALIBRATION,
    28: Split.BETWEEN,
    35: Split.TEST,
}
BUY_SOON = replace(BUY, name="purchase_7d", horizon_days=7)


def make_weekly_table(users: int = 400) -> SnapshotTable:
    """Labels of windows that close after the first test cut are unknown."""
    random = np.random.default_rng(0)
    day = np.repeat(list(WEEKLY), users)
    views = random.poisson(4, len(day)).astype(float)
    y = (random.random(len(day)) < 1 / (1 + np.exp(2 - 0.4 * views))).astype(float)
    open_windows = {t.name: (day < 35) & (day + t.horizon_days > 35) for t in (BUY, BUY_SOON)}
    start = datetime(2025, 1, 1)
    return SnapshotTable(
        user=np.tile(np.arange(users, dtype=np.int32), len(WEEKLY)),
        cut=(day // 7).astype(np.int32),
        # The last column tells the day that a baseline may see in its rows.
        features=np.column_stack([views, random.normal(size=len(day)), day.astype(float)]),
        feature_names=["f_views", "f_noise", "f_day"],
        labels={name: np.where(late, np.nan, y) for name, late in open_windows.items()},
        targets=(BUY, BUY_SOON),
        omitted=[],
        splits={d // 7: split for d, split in WEEKLY.items()},
        cut_times={d // 7: (start + timedelta(days=d)).isoformat() for d in WEEKLY},
    )


class Spy(Majority):
    """Remembers the days of the rows that it was fitted on."""

    days: list[int]

    def fit(self, x: Floats, y: Floats) -> None:
        assert np.isfinite(y).all()
        self.days = np.unique(x[:, -1]).astype(int).tolist()
        super().fit(x, y)


@pytest.fixture(scope="module")
def table() -> SnapshotTable:
    return make_table()


# Days of the cuts that a horizon is learnt from, in selection and in the refit.
learnt_from = pytest.mark.parametrize(
    ("target", "selection", "refit"),
    [(BUY_SOON, [0, 7, 14], [0, 7, 14, 21, 28]), (BUY, [0, 7], [0, 7, 14, 21])],
)


@learnt_from
def test_rows_of_a_horizon_end_where_their_windows_close(
    target: Target, selection: list[int], refit: list[int]
) -> None:
    first, second = Spy(), Spy()
    fit_twice(make_weekly_table(), target, first, second)
    assert (first.days, second.days) == (selection, refit)


@learnt_from
def test_trees_learn_from_the_windows_of_a_horizon_that_closed(
    target: Target, selection: list[int], refit: list[int]
) -> None:
    # With one round, the calibration labels cannot choose anything.
    config = Baselines(lightgbm=LightGBMConfig(rounds=1, search=()))

    def fit(table: SnapshotTable) -> tuple[Floats, Floats]:
        boosting = Boosting(table, config)
        boosting.fit_target(BUY if target is BUY_SOON else BUY_SOON)  # leaves no rows behind
        values = boosting.fit_target(target)[0]
        assert np.isfinite(values).all()
        return values[:400], values[400:]

    whole = fit(make_weekly_table())
    for day in WEEKLY:
        changed = make_weekly_table()
        here = changed.features[:, -1] == day
        changed.labels[target.name][here] = 1.0
        first, second = fit(changed)
        assert np.array_equal(first, whole[0]) == (day not in selection), day
        assert np.array_equal(second, whole[1]) == (day not in refit), day


def test_order_tells_buyers_in_every_model_but_the_majority(table: SnapshotTable) -> None:
    known = table.rows_of(Split.CALIBRATION, Split.TEST)
    y = table.labels[BUY.name][known]
    test = table.rows_of(Split.TEST)[known]
    scores = {
        "majority": fit_twice(table, BUY, Majority(), Majority()),
        "recency": fit_twice(table, BUY, Recency(0), Recency(0)),
        "logistic": fit_twice(scale(table)[0], BUY, Linear(Kind.BINARY), Linear(Kind.BINARY)),
        "lightgbm": Boosting(table, Baselines()).fit_target(BUY)[0],
    }
    auc = {name: roc_auc_score(y[test], p[test]) for name, p in scores.items()}
    assert auc["majority"] == 0.5
    assert auc["recency"] > 0.6
    assert auc["logistic"] > auc["recency"]
    assert auc["lightgbm"] > auc["recency"]
    for name, p in scores.items():
        assert p.mean() == pytest.approx(y.mean(), rel=0.1), name


def test_expected_totals_match(table: SnapshotTable) -> None:
    y = table.labels[SPEND.name][table.rows_of(Split.CALIBRATION, Split.TEST)]
    for p in (
        fit_twice(scale(table)[0], SPEND, Linear(Kind.AMOUNT), Linear(Kind.AMOUNT)),
        Boosting(table, Baselines()).fit_target(SPEND)[0],
    ):
        assert (p >= 0).all()
        assert p.sum() / y.sum() == pytest.approx(1, abs=0.1)


def test_the_test_labels_change_nothing(table: SnapshotTable) -> None:
    other = make_table()
    other.labels[BUY.name][other.rows_of(Split.TEST)] = 1
    for model in (Majority, lambda: Recency(0), lambda: Linear(Kind.BINARY)):
        ours, theirs = (fit_twice(scale(t)[0], BUY, model(), model()) for t in (table, other))
        np.testing.assert_array_equal(ours, theirs)
    ours, text = Boosting(table, Baselines()).fit_target(BUY)
    theirs, other_text = Boosting(other, Baselines()).fit_target(BUY)
    np.testing.assert_array_equal(ours, theirs)
    assert text == other_text


def test_calibration_rows_are_predicted_without_their_labels(table: SnapshotTable) -> None:
    other = make_table()
    calibration = other.rows_of(Split.CALIBRATION)
    other.labels[BUY.name][calibration] = 1 - other.labels[BUY.name][calibration]
    first = slice(0, int(calibration.sum()))
    a, b = (
        fit_twice(scale(t)[0], BUY, Linear(Kind.BINARY), Linear(Kind.BINARY))
        for t in (table, other)
    )
    np.testing.assert_array_equal(a[first], b[first])
    assert not np.array_equal(a, b)


def test_trees_never_take_threads_of_their_own(table: SnapshotTable) -> None:
    # LightGBM's count of threads is the process's: raised by one caller, others crash.
    def count_threads() -> tuple[int, int]:
        with threadpool_limits(4):
            before = psutil.Process().num_threads()
            config = LightGBMConfig(rounds=3)
            Boosting(table, Baselines(lightgbm=config)).fit_target(BUY)
            return before, psutil.Process().num_threads()

    # A new thread has no team of workers left over from what ran before.
    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(count_threads).result()
    assert after == before


def test_targets_side_by_side_have_the_trees_they_have_alone(table: SnapshotTable) -> None:
    targets = [BUY, SPEND] * 4
    shared = Boosting(table, Baselines())
    with ThreadPoolExecutor(len(targets)) as pool:
        together = list(pool.map(lambda target: shared.fit_target(target)[1], targets))
    alone = {t.name: Boosting(table, Baselines()).fit_target(t)[1] for t in (BUY, SPEND)}
    assert together == [alone[target.name] for target in targets]


def test_a_single_class_gives_its_rate() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    model = Linear(Kind.BINARY)
    model.fit(x, np.zeros(50))
    assert (model.predict(x) == 0).all()


@pytest.mark.parametrize("swallowed", [False, True])
def test_columns_that_are_nearly_one_are_fitted_in_double_precision(
    swallowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=(2000, 3))
    same = base @ random.normal(size=(3, 90)) + 1e-3 * random.normal(size=(2000, 90))
    x = 30 * np.hstack([same, random.normal(size=(2000, 5))])
    odds = -3 + base[:, 0] + x[:, -1] / 15
    y = (random.random(2000) < 1 / (1 + np.exp(-odds))).astype(float)
    models = [Linear(Kind.BINARY) for _ in range(8)]
    # A solver of one thread sets how the whole process warns.
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore" if swallowed else "error")
        if swallowed:  # by a thread that put back the filters of before
            deaf = SimpleNamespace(catch_warnings=nullcontext, simplefilter=lambda *_: None)
            monkeypatch.setattr(linear, "warnings", deaf)
        list(pool.map(lambda model: model.fit(x, y), models))
    exact = LogisticRegression(C=0.1, solver="newton-cholesky").fit(x, y > 0)
    for model in models:
        np.testing.assert_allclose(model.predict(x), exact.predict_proba(x)[:, 1], atol=1e-5)


def test_scaling_is_blind_to_what_closed_later() -> None:
    table, later = make_weekly_table(), make_weekly_table()
    # The days whose windows of two weeks close by the calibration cut.
    later.features[later.features[:, -1] > 7] += 100
    first, second = scale(table), scale(later)
    assert first[1].to_dict() == second[1].to_dict()
    early = table.features[:, -1] <= 7
    np.testing.assert_array_equal(first[0].features[early], second[0].features[early])
    assert first[0].features[early].mean(axis=0) == pytest.approx(0, abs=1e-9)


def test_one_shopper_out_of_all_proportion_is_no_warning() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(144, 20))
    x[7] *= 1e25
    y = (random.random(144) < 0.4).astype(float)
    model = Linear(Kind.BINARY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x, y)
        assert np.isfinite(model.predict(x[:7])).all()


def test_a_column_that_is_never_known_is_no_error() -> None:
    x = np.random.default_rng(0).normal(size=(80, 3))
    x[:, 1] = np.nan
    y = (x[:, 0] > 0).astype(float)
    model = Linear(Kind.BINARY)
    columns = Scaling.of(x).apply(x)
    assert columns.shape == (80, 4)
    model.fit(columns, y)
    assert np.isfinite(model.predict(columns)).all()
    recency = Recency(1)
    recency.fit(x, y)
    assert recency.predict(x) == pytest.approx(y.mean())


def test_the_calibration_cut_chooses_between_trees(table: SnapshotTable) -> None:
    stumps = TreeSettings(learning_rate=0.5, num_leaves=2, min_child_samples=1000)
    trees = TreeSettings(learning_rate=0.05, num_leaves=15, min_child_samples=20)

    def fit(own: TreeSettings, *search: TreeSettings) -> str:
        config = LightGBMConfig(**own.model_dump(), search=search, rounds=100)
        return Boosting(table, Baselines(lightgbm=config)).fit_target(BUY)[1]

    assert "[num_leaves: 15]" in fit(stumps, trees)
    assert fit(stumps, trees) == fit(trees, stumps) == fit(trees)
