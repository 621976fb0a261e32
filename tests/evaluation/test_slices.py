"""Groups of shoppers and shifts of inputs, on tables made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.config import Evaluation
from pipelines.evaluation.comparison import TestRows as Rows
from pipelines.evaluation.drift import measure_drift, stability_index
from pipelines.evaluation.slices import find_slices, score_slices
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import SnapshotTable

TARGET = Target(name="purchase_14d", kind=Kind.BINARY, event="purchase", horizon_days=14)
NAMES = ["f_tenure", "f_events", "f_gender"]


def make_table(shift: float = 0.0) -> SnapshotTable:
    rng = np.random.default_rng(0)
    count = 2000
    cut = np.repeat([0, 1], count // 2).astype(np.int32)
    tenure = rng.exponential(40, count) + shift * cut
    features = np.column_stack(
        [tenure, rng.poisson(8, count), rng.choice([0.0, 1.0, np.nan], count)]
    )
    return SnapshotTable(
        user=np.arange(count, dtype=np.int32),
        cut=cut,
        features=features,
        feature_names=NAMES,
        labels={TARGET.name: rng.integers(0, 2, count).astype(np.float64)},
        targets=(TARGET,),
        omitted=[],
        splits={0: Split.TRAIN, 1: Split.TEST},
        cut_times={0: "2025-01-01T00:00:00+00:00", 1: "2025-02-01T00:00:00+00:00"},
    )


def test_groups_are_those_of_the_features() -> None:
    table = make_table()
    rows = table.rows_of(Split.TEST)
    found = find_slices(table, rows)
    assert list(found) == ["new", "not new", "light", "not light", "gender 0", "gender 1"]
    tenure = table.features[rows, 0]
    assert np.array_equal(found["new"], tenure <= 28)
    assert np.array_equal(found["new"], ~found["not new"])


def test_a_group_in_which_the_candidate_fails_shows() -> None:
    table = make_table()
    rows = table.rows_of(Split.TEST)
    y = table.labels[TARGET.name][rows]
    slices = find_slices(table, rows)
    rng = np.random.default_rng(1)
    good = np.clip(0.5 + 0.4 * (y - 0.5) + rng.normal(0, 0.2, len(y)), 0.01, 0.99)
    bad_for_new = np.where(slices["new"], 1 - good, good)
    part = Rows(
        target=TARGET,
        y=y,
        predictions={"ensemble": bad_for_new, "lightgbm": good},
        thresholds={"ensemble": 0.5, "lightgbm": 0.5},
    )
    config = Evaluation(bootstrap_samples=50)
    found = score_slices(part, table.user[rows], slices, config)
    assert found["new"]["paired"]["ensemble-lightgbm"]["high"] < -0.3
    assert found["not new"]["paired"]["ensemble-lightgbm"]["diff"] == pytest.approx(0)
    assert found["new"]["rows"] == slices["new"].sum()


def test_a_shift_is_found_and_named_and_the_same_data_have_none() -> None:
    still, moved = measure_drift(make_table()), measure_drift(make_table(shift=60.0))
    assert still["share"] == 0
    assert moved["worst"][0]["feature"] == "f_tenure"
    assert moved["worst"][0]["psi"] > 0.25
    assert moved["share"] == pytest.approx(1 / 3)


def test_what_shifted_before_the_newest_windows_learnt_from_is_a_smaller_shift() -> None:
    table = make_table(shift=60.0)
    cut = np.where((table.cut == 1) & (table.user % 2 == 0), 2, table.cut).astype(np.int32)
    splits = {0: Split.TRAIN, 1: Split.BETWEEN, 2: Split.TEST}
    learnt = measure_drift(replace(table, cut=cut, splits=splits))
    assert learnt["worst"][0]["psi"] < measure_drift(table)["worst"][0]["psi"]


def test_the_index_of_two_bins_by_hand() -> None:
    before = np.array([0.0] * 50 + [1.0] * 50)
    after = np.array([0.0] * 80 + [1.0] * 20)
    expected = (0.5 - 0.8) * np.log(0.5 / 0.8) + (0.5 - 0.2) * np.log(0.5 / 0.2)
    assert stability_index(before, after) == pytest.approx(expected)
    assert stability_index(before, before) == pytest.approx(0)
    assert stability_index(np.full(10, np.nan), np.full(10, np.nan)) == pytest.approx(0)
