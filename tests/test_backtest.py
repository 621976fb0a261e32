from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import backtest
from pipelines.errors import UserError
from pipelines.io import read_json, write_json, write_text
from pipelines.workspace import RUNS


def write_end(folder: Path, end: str, *, modified: float) -> None:
    file = folder / "data/features/cuts.json"
    file.parent.mkdir(parents=True)
    write_json(file, {"first_ts": "2024-06-01T08:30:00+00:00", "end_ts": end})
    os.utime(file, (modified, modified))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_text(tmp_path / "params.yaml", "cuts: {train: 2}\n")
    return tmp_path


def make_evaluation(gpt: float, lightgbm: float | None) -> dict[str, Any]:
    models = {"ensemble": {"roc_auc": {"value": gpt}, "ece": {"value": 0.01}}}
    if lightgbm is not None:
        models["lightgbm"] = {"roc_auc": {"value": lightgbm}, "ece": {"value": 0.02}}
    return {
        "data": {"users": 10},
        "targets": {"purchase_14d": {"kind": "binary", "models": models}},
    }


def test_folds_go_back_from_the_end_of_the_log(home: Path) -> None:
    write_end(home, "2025-03-10T00:00:00+00:00", modified=1)
    days = backtest.list_folds(home, folds=3, step_days=7)
    assert days == ["2025-03-10", "2025-03-03", "2025-02-24"]


def test_the_end_is_that_of_the_newest_run_but_of_no_fold(home: Path) -> None:
    write_end(home, "2025-03-10T00:00:00+00:00", modified=1)
    write_end(home / RUNS / "manual-1", "2025-04-10T00:00:00+00:00", modified=2)
    write_end(home / RUNS / "backtest-2025", "2025-01-10T00:00:00+00:00", modified=3)
    assert backtest.list_folds(home, folds=1, step_days=7) == ["2025-04-10"]


def test_without_a_log_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro features"):
        backtest.list_folds(tmp_path, folds=1, step_days=7)


def test_folds_that_begin_before_the_log_are_refused_before_any_work(home: Path) -> None:
    write_end(home, "2024-10-20T00:00:00+00:00", modified=1)
    with pytest.raises(UserError, match="4 of 8 folds, 14 days apart, fit") as refused:
        backtest.list_folds(home, folds=8, step_days=14)
    assert "\n" not in str(refused.value)
    assert "Until 2024-08-25 the events span" in str(refused.value)
    assert len(backtest.list_folds(home, folds=4, step_days=14)) == 4
    with pytest.raises(UserError, match="0 of 1 folds"):
        write_end(home / RUNS / "new", "2024-07-01T00:00:00+00:00", modified=2)
        backtest.list_folds(home, folds=1, step_days=14)


def test_finished_folds_are_kept_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_fold(home: Path, until: str) -> dict[str, Any]:
        if until == "a":
            raise UserError("backtest: the fold until a ended with code 1")
        return backtest.summarise_fold(until, make_evaluation(0.8, 0.7))

    monkeypatch.setattr(backtest, "_run_fold", run_fold)
    with pytest.raises(UserError, match=r"fold until a .* holds the 2 before it"):
        backtest.run_folds(tmp_path, ["c", "b", "a"])
    kept = read_json(tmp_path / "reports/backtest.json")
    assert [fold["until"] for fold in kept["folds"]] == ["c", "b"]
    assert kept["targets"]["purchase_14d"]["folds"] == 2
    with pytest.raises(UserError, match=r"code 1$"):
        backtest.run_folds(tmp_path, ["a"])


def test_a_second_backtest_leaves_the_first_alone(home: Path) -> None:
    """Also one whose process was killed leaves the way free."""
    code = (
        "import time; from pathlib import Path; from pipelines import backtest\n"
        "def fold(*_): print('began', flush=True); time.sleep(60)\n"
        "backtest._run_fold = fold; backtest.run_folds(Path(), ['2025-01-01'])"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=home, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "began\n"
    for start in (lambda: backtest.run_folds(home, ["a"]), lambda: backtest.run_fold(home, "a")):
        with pytest.raises(UserError, match=r"^a backtest runs already in .*; wait until it has"):
            start()
    assert first.poll() is None
    first.kill()
    first.communicate()
    with pytest.raises(UserError, match="git"):
        backtest.run_fold(home, "a")


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
