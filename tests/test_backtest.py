from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines import backtest
from pipelines.errors import UserError
from pipelines.io import read_json, write_json
from pipelines.workspace import RUNS


def write_end(folder: Path, end: str, *, modified: float) -> None:
    file = folder / "data/features/cuts.json"
    file.parent.mkdir(parents=True)
    write_json(file, {"end_ts": end})
    os.utime(file, (modified, modified))


def make_evaluation(gpt: float, lightgbm: float | None) -> dict[str, Any]:
    models = {"ensemble": {"roc_auc": {"value": gpt}, "ece": {"value": 0.01}}}
    if lightgbm is not None:
        models["lightgbm"] = {"roc_auc": {"value": lightgbm}, "ece": {"value": 0.02}}
    return {
        "data": {"users": 10},
        "targets": {"purchase_14d": {"kind": "binary", "models": models}},
    }


def test_folds_go_back_from_the_end_of_the_log(tmp_path: Path) -> None:
    write_end(tmp_path, "2025-03-10T00:00:00+00:00", modified=1)
    days = backtest.list_folds(tmp_path, folds=3, step_days=7)
    assert days == ["2025-03-10", "2025-03-03", "2025-02-24"]


def test_the_end_is_that_of_the_newest_run_but_of_no_fold(tmp_path: Path) -> None:
    write_end(tmp_path, "2025-03-10T00:00:00+00:00", modified=1)
    write_end(tmp_path / RUNS / "manual-1", "2025-04-10T00:00:00+00:00", modified=2)
    write_end(tmp_path / RUNS / "backtest-2025", "2025-01-10T00:00:00+00:00", modified=3)
    assert backtest.list_folds(tmp_path, folds=1, step_days=7) == ["2025-04-10"]


def test_without_a_log_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro features"):
        backtest.list_folds(tmp_path, folds=1, step_days=7)


def test_the_folds_are_averaged_where_both_models_are(tmp_path: Path) -> None:
    folds = [
        backtest.summarise_fold(until, make_evaluation(gpt, lightgbm))
        for until, gpt, lightgbm in (("c", 0.8, 0.7), ("b", 0.7, 0.72), ("a", 0.9, None))
    ]
    result = backtest.gather(tmp_path, folds)
    found = result["targets"]["purchase_14d"]
    assert (found["folds"], found["ahead"]) == (2, 1)
    assert found["difference"] == pytest.approx(0.04)
    assert found["ensemble"] == pytest.approx(0.75)
    assert found["spread"] == pytest.approx(0.06 * 2**0.5)
    assert read_json(tmp_path / "reports/backtest.json") == result
    assert "+0.0400" in backtest.format_result(result)
    assert "1 of 2" in backtest.format_result(result)
