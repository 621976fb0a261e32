from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.config import Evaluation
from pipelines.evaluation.comparison import collect_test_rows, compare
from pipelines.evaluation.curves import (
    calibration_curve,
    confusion_rows,
    lift_curve,
    pr_curve,
    roc_curve,
    spend_deciles,
)
from pipelines.evaluation.findings import (
    Standing,
    describe_target,
    gap_closed,
    judge,
)
from pipelines.evaluation.report import (
    format_days,
    format_figure,
    format_percent,
    render_report,
)
from pipelines.evaluation.rivals import find_best_baseline
from pipelines.evaluation.summary import format_summary, tell_next
from pipelines.events import EVENT_TYPES, to_us
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.stages.evaluate import _has_seen

CONFIG = Evaluation(bootstrap_samples=100)
DATA = {
    "source": "simulator",
    "events": 10,
    "users": 5,
    "first_ts": "2025-01-01T00:00:00+00:00",
    "last_ts": "2025-05-01T00:00:00+00:00",
    "share_of_shoppers": 1.0,
    "rows": 1234,
    "quarantined": 3,
    "anonymous": 2,
    "duplicates": 1,
}
TARGETS = (
    Target(name="purchase_14d", kind=Kind.BINARY, event="purchase", horizon_days=14),
    Target(name="spend_14d", kind=Kind.AMOUNT, event=None, horizon_days=14),
)


def make_table(users: int = 800) -> tuple[SnapshotTable, dict[str, Any]]:
    """Three cuts; the truth depends on a score that the better model sees with less noise."""
    random = np.random.default_rng(4)
    rows = 3 * users
    score = random.normal(size=rows)
    p = 1 / (1 + np.exp(1.2 - 1.5 * score))
    y = (random.random(rows) < p).astype(float)
    spend = y * random.gamma(2, 20 * np.exp(0.3 * score))
    table = SnapshotTable(
        user=np.tile(np.arange(users, dtype=np.int32), 3),
        cut=np.repeat(np.arange(3, dtype=np.int32), users),
        features=np.zeros((rows, 1)),
        feature_names=["f_x"],
        labels={"purchase_14d": y, "spend_14d": spend},
        targets=TARGETS,
        omitted=[{"name": "search_14d", "why": "no search in any training window"}],
        splits={0: Split.TRAIN, 1: Split.CALIBRATION, 2: Split.TEST},
        cut_times={0: "2025-01-01", 1: "2025-02-01", 2: "2025-03-01T00:00:00+00:00"},
    )
    known = table.rows_of(Split.CALIBRATION, Split.TEST)

    def noisy(sd: float) -> dict[str, Any]:
        seen = score + random.normal(0, sd, rows)
        q = 1 / (1 + np.exp(1.2 - 1.5 * seen))
        return {"purchase_14d": q[known], "spend_14d": (q * 40)[known]}

    predictions = {
        "ensemble": noisy(0.2),
        "gpt": noisy(0.4),
        "lightgbm": noisy(1.5),
        "oracle": {"purchase_14d": p[known], "spend_14d": (p * 40)[known]},
        "majority": {
            k: np.full(known.sum(), v) for k, v in (("purchase_14d", 0.3), ("spend_14d", 9.0))
        },
    }
    return table, predictions


@pytest.fixture(scope="module")
def compared() -> tuple[dict[str, Any], Any]:
    table, predictions = make_table()
    test = collect_test_rows(table, predictions, CONFIG)
    return compare(table, test, CONFIG, data=DATA), test


def test_the_report_has_the_agreed_keys(compared: tuple[dict[str, Any], Any]) -> None:
    evaluation, _test = compared
    target = evaluation["targets"]["purchase_14d"]
    assert {"kind", "base_rate", "users", "cuts", "models", "paired"} <= target.keys()
    assert set(target["models"]["ensemble"]) == {
        "roc_auc",
        "pr_auc",
        "log_loss",
        "brier",
        "ece",
        "ece_by_chance",
        "ece_to_oracle",
        "accuracy",
        "precision",
        "recall",
        "f1",
        "threshold",
        "lift_at_10pct",
    }
    assert set(evaluation["targets"]["spend_14d"]["models"]["ensemble"]) == {
        "mae",
        "gini",
        "top_decile_capture",
        "total_ratio",
    }
    assert target["cuts"] == ["2025-03-01T00:00:00+00:00"]
    auc = target["models"]["ensemble"]["roc_auc"]
    assert auc["low"] < auc["value"] < auc["high"]
    majority = target["models"]["majority"]
    assert majority["accuracy"]["value"] == pytest.approx(1 - target["base_rate"])
    # Chance only ever adds to it, and more in the samples: what they span is no interval of it.
    assert target["models"]["ensemble"]["ece"].keys() == {"value", "low", "high"}
    assert target["models"]["ensemble"]["ece"]["low"] is None
    assert target["paired"]["ensemble-gpt"]["ece"]["low"] is not None


def test_the_oracle_in_place_of_outcomes_tells_calibration_without_chance(
    compared: tuple[dict[str, Any], Any],
) -> None:
    evaluation, test = compared
    models = evaluation["targets"]["purchase_14d"]["models"]
    exact = {name: model["ece_to_oracle"] for name, model in models.items()}
    assert exact["oracle"] == 0
    assert models["oracle"]["ece"]["value"] > 0.01
    assert 0 < exact["ensemble"] < exact["lightgbm"]
    said = test[0].predictions
    # One probability for all is one bin.
    off = abs((said["majority"] - said["oracle"]).mean())
    assert exact["majority"] == pytest.approx(off, abs=1e-6)
    table, predictions = make_table()
    del predictions["oracle"]
    other = compare(table, collect_test_rows(table, predictions, CONFIG), CONFIG, data=DATA)
    assert "ece_to_oracle" not in other["targets"]["purchase_14d"]["models"]["ensemble"]


def test_the_better_model_is_ahead_and_nobody_beats_the_oracle(
    compared: tuple[dict[str, Any], Any],
) -> None:
    target = compared[0]["targets"]["purchase_14d"]
    assert judge(target, "ensemble", "lightgbm", "roc_auc") is Standing.AHEAD
    assert judge(target, "lightgbm", "ensemble", "roc_auc") is Standing.BEHIND
    assert judge(target, "ensemble", "lightgbm", "brier") is Standing.AHEAD
    assert judge(target, "ensemble", "oracle", "roc_auc") is not Standing.AHEAD
    assert judge(target, "ensemble", "nobody", "roc_auc") is Standing.UNKNOWN
    assert 0.8 < (gap_closed(target, "ensemble") or 0) <= 1.02
    assert "ahead of LightGBM" in describe_target("purchase_14d", target)


def test_a_model_that_has_learnt_from_the_test_window_is_known() -> None:
    table = make_table()[0]
    tested = to_us(table.first_cut(Split.TEST))
    for until, expected in ((tested, False), (tested + 1, True), (None, False)):
        model: Any = SimpleNamespace(spec=SimpleNamespace(learnt_until=until))
        assert _has_seen(model, table) is expected


def test_a_baseline_that_does_better_than_lightgbm_is_named(
    compared: tuple[dict[str, Any], Any],
) -> None:
    target = copy.deepcopy(compared[0]["targets"]["purchase_14d"])
    assert find_best_baseline(target["models"], "roc_auc", higher=True) == "lightgbm"
    assert "best baseline" not in describe_target("purchase_14d", target)
    target["models"]["lstm"] = copy.deepcopy(target["models"]["lightgbm"])
    target["models"]["lstm"]["roc_auc"]["value"] += 0.01
    target["models"]["with_mlp"] = copy.deepcopy(target["models"]["oracle"])
    target["paired"]["ensemble-lstm"] = {"roc_auc": {"diff": 0.01, "low": -0.01, "high": 0.03}}
    assert find_best_baseline(target["models"], "roc_auc", higher=True) == "lstm"
    told = describe_target("purchase_14d", target)
    assert "ahead of LightGBM" in told
    assert "it is tied with the best baseline, lstm (difference +0.0100" in told


def test_precision_is_told_of_as_many_as_tell_it(compared: tuple[dict[str, Any], Any]) -> None:
    binary = compared[1][0]
    positives = int((binary.y > 0).sum())
    rows = [row for row in pr_curve(binary) if row["model"] == "ensemble"]
    assert rows[0]["recall"] * positives / rows[0]["precision"] >= 19
    assert rows[-1]["recall"] == 1


def test_the_test_cut_chooses_nothing() -> None:
    """Other outcomes on the test cut leave thresholds as they are."""
    table, predictions = make_table()
    other, same = make_table()
    test_rows = other.rows_of(Split.TEST)
    for values in other.labels.values():
        values[test_rows] = 0
    a = collect_test_rows(table, predictions, CONFIG)[0]
    b = collect_test_rows(other, same, CONFIG)[0]
    assert a.thresholds == b.thresholds
    assert a.sets is not None
    assert b.sets is not None
    assert (a.sets.yes == b.sets.yes).all()
    assert (a.sets.no == b.sets.no).all()


def test_a_shopper_of_several_test_cuts_is_counted_once() -> None:
    """The gate wants so many shoppers and so many who did it."""
    table, predictions = make_table(users=50)
    splits = {0: Split.CALIBRATION, 1: Split.TEST, 2: Split.TEST}
    table = replace(table, splits=splits)
    rng = np.random.default_rng(6)
    for told in predictions.values():
        told |= {name: rng.random(150) for name in told}
    test = collect_test_rows(table, predictions, CONFIG)
    target = compare(table, test, CONFIG, data=DATA)["targets"]["purchase_14d"]
    assert (target["users"], target["rows"]) == (50, 100)
    assert target["positives"] == table.labels["purchase_14d"][50:].sum()
    # Each pair is told once, the one that is compared with the others first.
    pairs = [frozenset(pair.split("-")) for pair in target["paired"]]
    assert len(pairs) == len(set(pairs)) == 4 + 3 + 2


def test_a_model_is_judged_by_the_threshold_that_it_ships_with() -> None:
    table, predictions = make_table()
    shipped = {"ensemble": {"purchase_14d": 0.123}}
    (alone, _), (test, amount) = (
        collect_test_rows(table, predictions, CONFIG, shipped=s) for s in (None, shipped)
    )
    assert test.thresholds == alone.thresholds | {"ensemble": 0.123}
    assert not amount.thresholds
    target = compare(table, [test], CONFIG, data=DATA)["targets"]["purchase_14d"]
    assert target["models"]["ensemble"]["threshold"] == 0.123


def test_the_page_and_the_table_show_everything(compared: tuple[dict[str, Any], Any]) -> None:
    evaluation, (binary, amount) = compared
    curves = {
        "roc": roc_curve(binary),
        "pr": pr_curve(binary),
        "lift": lift_curve(binary),
        "calibration": calibration_curve(binary),
        "spend": spend_deciles(amount),
    }
    settings = {
        "bootstrap_samples": 100,
        "confidence": 0.95,
        "threshold": "f1",
        "active_within_days": None,
    }
    page = render_report(evaluation, curves, settings=settings)
    assert page.count("<svg") == 5
    assert "search_14d" in page
    assert re.search(r"on average they spent [\d.]+, before returns", page)
    assert "http" not in page.replace("http-equiv", "")
    assert render_report(evaluation, curves, settings=settings) == page
    assert "stand for all" not in page
    some = evaluation | {"data": DATA | {"share_of_shoppers": 0.354}}
    assert "35.4 % of them" in render_report(some, curves, settings=settings)
    text = format_summary(evaluation, {"passed": False, "checks": []})
    assert "purchase_14d" in text
    assert "left out: search_14d" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("event", EVENT_TYPES)
def test_every_event_type_makes_a_question(
    compared: tuple[dict[str, Any], Any], event: str
) -> None:
    evaluation = copy.deepcopy(compared[0])
    evaluation["targets"] = {f"{event}_14d": evaluation["targets"]["purchase_14d"]}
    (asked,) = re.findall(r"Will they [^<]* in the next 14 days\?", show(evaluation))
    assert "_" not in asked


def test_the_summary_names_targets_in_full(compared: tuple[dict[str, Any], Any]) -> None:
    evaluation = copy.deepcopy(compared[0])
    for days in (7, 365):
        evaluation["targets"][f"remove_from_cart_{days}d"] = evaluation["targets"]["purchase_14d"]
    lines = format_summary(evaluation, None).splitlines()
    assert {"remove_from_cart_7d", "remove_from_cart_365d"} < {line.split(" ")[0] for line in lines}
    assert max(map(len, lines)) <= 110


def show(evaluation: dict[str, Any]) -> str:
    empty: dict[str, list[dict[str, Any]]] = {
        k: [] for k in ("roc", "pr", "lift", "calibration", "spend")
    }
    settings = {"bootstrap_samples": 1, "confidence": 0.9, "threshold": "f1"}
    return render_report(evaluation, empty, settings=settings)


def test_no_interval_leaves_out_its_own_value(compared: tuple[dict[str, Any], Any]) -> None:
    evaluation = copy.deepcopy(compared[0])
    target = evaluation["targets"]["purchase_14d"]
    target["models"]["ensemble"]["ece"]["value"] = 0.0154
    page = show(evaluation)
    assert "0.015</td>" in page
    found = target["models"]["ensemble"]["roc_auc"]
    assert f"<small>{found['low']:.3f} to {found['high']:.3f}</small>" in page


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.563, "Saying “everybody” would be right 56.3 %"),
        (0.2, "Saying “nobody” would be right 80.0 %"),
    ],
)
def test_the_simplest_rule_is_the_one_that_is_right_more_often(
    compared: tuple[dict[str, Any], Any], share: float, said: str
) -> None:
    evaluation = copy.deepcopy(compared[0])
    evaluation["targets"]["purchase_14d"]["base_rate"] = share
    assert said in show(evaluation)


def test_a_name_from_the_data_cannot_break_the_page(compared: tuple[dict[str, Any], Any]) -> None:
    evaluation = compared[0] | {"data": DATA | {"source": "<script>alert(1)</script>"}}
    assert "<script>" not in show(evaluation)


def test_what_comes_next_follows_from_verdict_and_champion() -> None:
    verdict = {"candidate": "sha256:1", "passed": True, "checks": [{"passed": True, "why": "fine"}]}
    assert "promote" in tell_next(verdict, None)
    assert "promote" in tell_next(verdict, "sha256:2")
    assert tell_next(verdict, "sha256:1").startswith(".venv/bin/forecart serve")
    refused = verdict | {"passed": False, "checks": [{"name": "size", "passed": False}]}
    said = tell_next(refused, "sha256:2")
    assert said.startswith("not to be promoted (size): ")
    assert "forecart tune" in said
    assert "dvc repro gate" in said


def test_confusion_rows_count_every_test_row(compared: tuple[dict[str, Any], Any]) -> None:
    rows = confusion_rows(compared[1][0], "ensemble")
    assert len(rows) == 800
    assert {r["actual"] for r in rows} == {"yes", "no"}


def test_a_single_day_is_no_days() -> None:
    assert [format_days(days) for days in (1, 7, 0.5)] == ["1 day", "7 days", "0.5 days"]
    assert format_days(1, one="day") == "day"


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.0, "0.0 %"),
        (0.0002, "0.020 %"),
        (0.0022, "0.22 %"),
        (0.3835, "38.4 %"),
        (0.9978, "99.78 %"),
        (1.0, "100.0 %"),
    ],
)
def test_rare_events_are_not_rounded_away(share: float, told: str) -> None:
    assert format_percent(share) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0.000"), (0.0084, "0.0084"), (-0.0013, "-0.0013"), (0.854, "0.854"), (12.5, "12.500")],
)
def test_small_figures_have_a_decimal_more(value: float, told: str) -> None:
    assert format_figure(value) == told
