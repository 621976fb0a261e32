from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Gate, parse_params
from pipelines.errors import UserError
from pipelines.io import digest_directory, write_json
from pipelines.registry.gate import decide
from pipelines.stages import gate as stage

POLICY = Gate()
CANDIDATE, CHAMPION, DATA = "sha256:" + "a" * 64, "sha256:" + "c" * 64, "sha256:" + "d" * 64
VALID = {"passed": True}
PACKAGE = {"model": CANDIDATE, "size_mb": 2.0, "p99_at_most_ms": 20.0}


def interval(value: float, width: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def pair(diff: float, width: float = 0.005) -> dict[str, Any]:
    """A paired difference in both directions of metrics: the loss falls as the AUC rises."""
    return {
        "roc_auc": {"diff": diff, "low": diff - width, "high": diff + width},
        "log_loss": {"diff": -diff, "low": -diff - width, "high": -diff + width},
    }


def make_evaluation(**gains: float) -> dict[str, Any]:
    """An evaluation in which the candidate has certain gains over other models."""
    auc = 0.72
    usual = {"majority": 0.22, "recency": 0.05, "logistic": 0.02, "lightgbm": 0.0}
    gains = usual | gains
    models = {
        name: {
            "roc_auc": interval(auc - gain),
            "log_loss": interval(0.4 + gain),
            "ece": {"value": 0.02, "low": 0.01, "high": 0.03},
        }
        for name, gain in {"ensemble": 0.0, **gains, "oracle": -0.02}.items()
    }
    return {
        "data": {"source": "simulator"},
        "drift": {"features": 100, "share": 0.1, "worst": [{"feature": "f_tenure", "psi": 0.9}]},
        "targets": {
            "purchase_14d": {
                "kind": "binary",
                "base_rate": 0.15,
                "users": 3000,
                "models": models,
                "paired": {f"ensemble-{name}": pair(gain) for name, gain in gains.items()},
                "slices": {},
            },
            "spend_14d": {"kind": "amount", "users": 3000, "models": {"ensemble": {"mae": 3.0}}},
        },
    }


def judge(
    evaluation: dict[str, Any],
    *,
    validation: dict[str, Any] = VALID,
    package: dict[str, Any] = PACKAGE,
    policy: Gate = POLICY,
    champion: str | None = None,
    candidate: str = CANDIDATE,
) -> dict[str, Any]:
    verdict = decide(
        evaluation,
        validation,
        package,
        policy,
        candidate=candidate,
        champion=champion,
        data=DATA,
    )
    json.dumps(verdict, allow_nan=False)
    assert all(
        c.keys() == {"name", "passed", "value", "limit", "why"} and c["why"]
        for c in verdict["checks"]
    )
    assert verdict["passed"] == (not failed(verdict))
    return verdict


def failed(verdict: dict[str, Any]) -> list[str]:
    return [c["name"] for c in verdict["checks"] if not c["passed"]]


def test_a_first_model_as_good_as_the_best_baseline_passes() -> None:
    verdict = judge(make_evaluation())
    assert verdict["passed"]
    assert verdict["candidate"] == CANDIDATE
    assert verdict["champion"] is None
    assert verdict["data"] == DATA
    assert [c["name"] for c in verdict["checks"]] == [
        "validation",
        "users",
        "positives",
        "base_rate",
        "calibration",
        "slices",
        "drift",
        "beats_majority",
        "beats_recency",
        "not_worse_than_best_baseline",
        "latency",
        "size",
    ]


@pytest.mark.parametrize(
    ("gain", "passed"), [(0.03, True), (0.0, True), (-0.004, True), (-0.006, False), (-0.05, False)]
)
def test_the_margin_holds_against_the_best_baseline_by_interval(gain: float, passed: bool) -> None:
    verdict = judge(make_evaluation(lightgbm=gain))
    assert failed(verdict) == ([] if passed else ["not_worse_than_best_baseline"])
    told = "better for sure" if gain == 0.03 else "inside the margin" if passed else "outside"
    assert told in verdict["checks"][-3]["why"]


def test_what_came_true_is_named() -> None:
    told = {check["name"]: check["why"] for check in judge(make_evaluation())["checks"]}
    assert told["positives"].startswith("purchase_14d came true 450 times; ")
    assert told["base_rate"] == "purchase_14d came true for 15.00% of the shoppers"


def test_the_best_baseline_is_the_one_that_counts() -> None:
    verdict = judge(make_evaluation(lightgbm=0.05, logistic=-0.05))
    assert failed(verdict) == ["not_worse_than_best_baseline"]
    assert "logistic" in verdict["checks"][-3]["why"]


def test_what_is_trained_to_be_compared_does_not_judge() -> None:
    assert judge(make_evaluation(lightgbm=0.05, with_cnn=-0.05))["passed"]


@pytest.mark.parametrize("rule", ["majority", "recency"])
def test_a_gain_within_the_noise_does_not_beat_a_rule_of_thumb(rule: str) -> None:
    assert failed(judge(make_evaluation(**{rule: 0.004}))) == [f"beats_{rule}"]


def test_where_less_is_better_the_sign_is_turned() -> None:
    policy = Gate(primary_metric="log_loss")
    assert judge(make_evaluation(), policy=policy)["passed"]
    verdict = judge(make_evaluation(lightgbm=-0.05), policy=policy)
    assert failed(verdict) == ["not_worse_than_best_baseline"]
    assert "lightgbm" in verdict["checks"][-3]["why"]


@pytest.mark.parametrize("metric", ["roc_auc", "log_loss"])
@pytest.mark.parametrize(("gain", "passed"), [(0.03, True), (-0.03, False)])
def test_a_pair_may_be_written_either_way_round(metric: Any, gain: float, passed: bool) -> None:
    evaluation = make_evaluation(champion=gain)
    paired = evaluation["targets"]["purchase_14d"]["paired"]
    paired["champion-ensemble"] = {
        name: {"diff": -p["diff"], "low": -p["high"], "high": -p["low"]}
        for name, p in paired.pop("ensemble-champion").items()
    }
    verdict = judge(evaluation, champion=CHAMPION, policy=Gate(primary_metric=metric))
    assert failed(verdict) == ([] if passed else ["not_worse_than_champion"])


def test_failed_validation_fails() -> None:
    verdict = judge(make_evaluation(), validation={"passed": False})
    assert failed(verdict) == ["validation"]
    assert "did not pass validation; see reports/data_docs" in verdict["checks"][0]["why"]
    assert judge(make_evaluation())["checks"][0]["why"] == "the data passed validation"
    assert failed(judge(make_evaluation(), validation={})) == ["validation"]


def test_a_badly_calibrated_candidate_fails() -> None:
    evaluation = make_evaluation()
    evaluation["targets"]["purchase_14d"]["models"]["ensemble"]["ece"] = 0.08
    assert failed(judge(evaluation)) == ["calibration"]
    del evaluation["targets"]["purchase_14d"]["models"]["ensemble"]["ece"]
    assert failed(judge(evaluation)) == ["calibration"]


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("users", 150, ["users"]),
        ("base_rate", 0.005, ["positives"]),
        ("base_rate", 0.0, ["positives", "base_rate"]),
        ("base_rate", 1.0, ["base_rate"]),
    ],
)
def test_too_little_or_strange_data_fails(key: str, value: float, names: list[str]) -> None:
    evaluation = make_evaluation()
    evaluation["targets"]["purchase_14d"][key] = value
    verdict = judge(evaluation)
    assert failed(verdict) == names
    (rate,) = [c["why"] for c in verdict["checks"] if c["name"] == "base_rate"]
    assert ("looks like damaged data" in rate) is ("base_rate" in names)


def test_what_is_exactly_at_its_limit_is_allowed() -> None:
    evaluation = make_evaluation(champion=0.0)
    target = evaluation["targets"]["purchase_14d"]
    target |= {"users": POLICY.min_users, "positives": POLICY.min_positives}
    target["models"]["ensemble"]["ece"] = target["models"]["champion"]["ece"] = POLICY.max_ece
    for rival in ("ensemble-lightgbm", "ensemble-champion"):
        target["paired"][rival]["roc_auc"]["low"] = -POLICY.margin
    for rate in (POLICY.min_base_rate, POLICY.max_base_rate):
        target["base_rate"] = rate
        assert judge(evaluation)["passed"]
        assert judge(evaluation, champion=CHAMPION)["passed"]


def test_no_gain_at_all_does_not_beat_a_rule_of_thumb() -> None:
    evaluation = make_evaluation()
    evaluation["targets"]["purchase_14d"]["paired"]["ensemble-recency"]["roc_auc"]["low"] = 0.0
    verdict = judge(evaluation)
    assert failed(verdict) == ["beats_recency"]
    assert "not more than chance" in verdict["checks"][8]["why"]


def test_calibration_is_told_as_it_was_measured() -> None:
    evaluation = make_evaluation(champion=0.0)
    told = {c["name"]: c for c in judge(evaluation, champion=CHAMPION)["checks"]}
    assert (told["calibration"]["value"], told["calibration"]["limit"]) == (0.02, 0.05)
    assert "differ by 0.0200 on average (ECE); 0.05 is allowed" in told["calibration"]["why"]
    against = told["calibration_against_champion"]
    assert (against["value"], against["limit"]) == (0.02, pytest.approx(0.03))
    assert against["why"] == "the champion's ECE is 0.0200; 0.01 more is allowed"
    models = evaluation["targets"]["purchase_14d"]["models"]
    del models["ensemble"]["ece"], models["champion"]["ece"]
    verdict = judge(evaluation, champion=CHAMPION)
    assert failed(verdict) == ["calibration", "calibration_against_champion"]
    told = {c["name"]: c for c in verdict["checks"]}
    assert "was not measured" in told["calibration"]["why"]
    assert "cannot be compared" in told["calibration_against_champion"]["why"]


@pytest.mark.parametrize(
    ("gain", "passed"), [(0.03, True), (0.0, True), (-0.006, False), (-0.05, False)]
)
def test_a_champion_is_what_later_candidates_are_held_against(gain: float, passed: bool) -> None:
    evaluation = make_evaluation(champion=gain, lightgbm=-0.05)
    verdict = judge(evaluation, champion=CHAMPION)
    assert failed(verdict) == ([] if passed else ["not_worse_than_champion"])


def test_worse_calibration_than_the_champion_fails() -> None:
    evaluation = make_evaluation(champion=0.02)
    models = evaluation["targets"]["purchase_14d"]["models"]
    models["ensemble"]["ece"]["value"] = 0.029
    assert judge(evaluation, champion=CHAMPION)["passed"]
    models["ensemble"]["ece"]["value"] = 0.031
    assert failed(judge(evaluation, champion=CHAMPION)) == ["calibration_against_champion"]


def test_a_champion_that_was_not_scored_fails() -> None:
    verdict = judge(make_evaluation(), champion=CHAMPION)
    assert failed(verdict) == ["calibration_against_champion", "not_worse_than_champion"]


def test_a_champion_does_not_excuse_a_candidate_that_a_rule_of_thumb_beats() -> None:
    evaluation = make_evaluation(champion=0.03, recency=0.004)
    assert failed(judge(evaluation, champion=CHAMPION)) == ["beats_recency"]


@pytest.mark.parametrize(("fallen", "names"), [(0.1, ["not_worse_than_best_baseline"]), (0.0, [])])
def test_a_champion_of_another_shop_does_not_excuse_the_candidate_from_the_baselines(
    fallen: float, names: list[str]
) -> None:
    evaluation = make_evaluation(champion=0.03, lightgbm=-0.05)
    paired = evaluation["targets"]["purchase_14d"]["paired"]
    paired["lightgbm-champion"] = pair(fallen)
    assert failed(judge(evaluation, champion=CHAMPION)) == names
    # Not surely by more than the margin.
    paired["lightgbm-champion"]["roc_auc"]["low"] = POLICY.margin
    assert judge(evaluation, champion=CHAMPION)["passed"]


def test_a_champion_that_predicts_something_else_is_passed_over() -> None:
    evaluation = make_evaluation()
    evaluation["champion"] = {"targets": ["purchase_7d"]}
    verdict = judge(evaluation, champion=CHAMPION)
    assert verdict["passed"]
    assert verdict["champion"] == CHAMPION
    told = {check["name"]: check["why"] for check in verdict["checks"]}
    assert "does not predict purchase_14d" in told["not_worse_than_champion"]
    assert "not_worse_than_best_baseline" in told
    evaluation = make_evaluation(lightgbm=-0.05)
    evaluation["champion"] = {"targets": ["purchase_7d"]}
    failures = failed(judge(evaluation, champion=CHAMPION))
    assert failures == ["not_worse_than_best_baseline"]


def test_a_champion_that_has_learnt_from_the_test_is_passed_over() -> None:
    evaluation = make_evaluation()
    evaluation["champion"] = {"targets": [], "learnt_from_tests": True}
    told = {c["name"]: c["why"] for c in judge(evaluation, champion=CHAMPION)["checks"]}
    assert "has learnt from the days that are tested" in told["not_worse_than_champion"]
    assert "not_worse_than_best_baseline" in told


def test_the_champion_itself_passes_again() -> None:
    # Also where a rule of thumb or a baseline has caught up with it.
    verdict = judge(make_evaluation(recency=0.0, lightgbm=-0.05), champion=CANDIDATE)
    assert verdict["passed"]
    assert verdict["checks"][-3]["why"] == "the candidate is the champion"


@pytest.mark.parametrize("target", ["search_14d", "spend_14d"])
def test_a_target_that_cannot_be_judged_fails_with_the_way_out(target: str) -> None:
    evaluation = make_evaluation()
    evaluation["omitted"] = [{"name": "search_14d", "why": "no search events"}]
    verdict = judge(evaluation, policy=Gate(primary_target=target))
    assert failed(verdict) == ["primary_target"]
    assert "gate.primary_target" in verdict["checks"][-3]["why"]
    told = "no search events" if target == "search_14d" else "spend_14d is an amount"
    assert told in verdict["checks"][-3]["why"]


@pytest.mark.parametrize("part", ["ensemble", "lightgbm", "pairs"])
def test_what_was_not_measured_fails(part: str) -> None:
    evaluation = make_evaluation()
    target = evaluation["targets"]["purchase_14d"]
    if part == "pairs":
        del target["paired"]
    elif part == "ensemble":
        del target["models"]["ensemble"]
    else:
        for name in ("majority", "recency", "logistic", "lightgbm"):
            del target["models"][name]
    assert not judge(evaluation)["passed"]


def test_the_verdict_is_a_pure_function_of_its_inputs() -> None:
    evaluation = make_evaluation(logistic=0.0)
    before = copy.deepcopy(evaluation)
    assert judge(evaluation) == judge(evaluation)
    assert evaluation == before


def test_the_stage_writes_the_verdict(tmp_path: Path) -> None:
    for folder in ("models/gpt", "data/features", "reports"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/gpt/config.json").write_text("{}")
    (tmp_path / "data/features/cuts.json").write_text("{}")
    params = parse_params({})
    with pytest.raises(UserError, match=r"reports/evaluation\.json"):
        stage.run(params, tmp_path)
    write_json(tmp_path / "reports/evaluation.json", make_evaluation())
    write_json(tmp_path / "reports/validation.json", VALID)
    digest = digest_directory(tmp_path / "models/gpt")
    write_json(tmp_path / "reports/package.json", PACKAGE | {"model": digest})
    assert "passed 12 checks" in stage.run(params, tmp_path)
    verdict = json.loads((tmp_path / "reports/verdict.json").read_text())
    assert verdict["candidate"] == digest_directory(tmp_path / "models/gpt")
    assert verdict["data"] == digest_directory(tmp_path / "data/features")


def make_group(high: float, rows: int = 1000) -> dict[str, Any]:
    paired = {"ensemble-lightgbm": {"diff": high - 0.01, "low": high - 0.02, "high": high}}
    paired["ensemble-champion"] = paired["ensemble-lightgbm"]
    return {"rows": rows, "positives": rows // 5, "models": {}, "paired": paired}


@pytest.mark.parametrize(
    ("groups", "passed"),
    [
        ({"new": make_group(0.01), "light": make_group(-0.01)}, True),
        ({"new": make_group(0.01), "light": make_group(-0.03)}, False),
        ({"new": make_group(-0.3, rows=50)}, True),  # too few to judge
        ({}, True),
    ],
)
def test_a_group_that_surely_loses_fails(groups: dict[str, Any], passed: bool) -> None:
    evaluation = make_evaluation()
    evaluation["targets"]["purchase_14d"]["slices"] = groups
    verdict = judge(evaluation)
    (check,) = [c for c in verdict["checks"] if c["name"] == "slices"]
    assert check["passed"] is passed
    assert verdict["passed"] is passed
    assert passed or "light (-0.030 at best)" in check["why"]
    judged = sum(group["rows"] >= POLICY.min_users for group in groups.values())
    assert f"of {judged} groups" in check["why"]
    assert (check["value"], check["limit"]) == (None if passed else -0.03, -POLICY.slice_margin)


def test_groups_that_were_not_compared_fail() -> None:
    evaluation = make_evaluation()
    del evaluation["targets"]["purchase_14d"]["slices"]
    verdict = judge(evaluation)
    assert failed(verdict) == ["slices"]
    assert "not compared on purchase_14d" in verdict["checks"][5]["why"]
    assert verdict["checks"][5]["limit"] == -POLICY.slice_margin


def test_a_group_is_held_against_the_champion_where_there_is_one() -> None:
    evaluation = make_evaluation(champion=0.0)
    group = make_group(0.01)
    group["paired"]["ensemble-champion"] = {"diff": -0.04, "low": -0.05, "high": -0.03}
    evaluation["targets"]["purchase_14d"]["slices"] = {"new": group}
    assert judge(evaluation)["passed"]
    verdict = judge(evaluation, champion=CHAMPION)
    assert failed(verdict) == ["slices"]
    told = {c["name"]: c["why"] for c in verdict["checks"]}
    assert "lose against champion: new (-0.030 at best)" in told["slices"]


@pytest.mark.parametrize(
    ("rows", "positives", "high", "passed"),
    [
        (POLICY.min_users, POLICY.min_positives, -0.03, False),
        (POLICY.min_users - 1, POLICY.min_positives, -0.03, True),
        (POLICY.min_users, POLICY.min_positives - 1, -0.03, True),
        (POLICY.min_users, POLICY.min_positives, -POLICY.slice_margin, True),
    ],
)
def test_a_group_just_large_enough_is_judged(
    rows: int, positives: int, high: float, passed: bool
) -> None:
    evaluation = make_evaluation()
    group = make_group(high) | {"rows": rows, "positives": positives}
    evaluation["targets"]["purchase_14d"]["slices"] = {"new": group}
    verdict = judge(evaluation)
    assert failed(verdict) == ([] if passed else ["slices"])


@pytest.mark.parametrize(("share", "passed"), [(0.5, True), (0.51, False), (None, False)])
def test_shifted_inputs_fail(share: float | None, passed: bool) -> None:
    evaluation = make_evaluation()
    evaluation["drift"]["share"] = share
    verdict = judge(evaluation)
    (check,) = [c for c in verdict["checks"] if c["name"] == "drift"]
    assert check["passed"] is verdict["passed"] is passed


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ({"p99_at_most_ms": 200.0, "size_mb": 100.0}, []),
        ({"p99_at_most_ms": 500.0}, ["latency"]),
        ({"size_mb": 100.01}, ["size"]),
        ({"model": CHAMPION}, ["latency", "size"]),
    ],
)
def test_a_model_too_slow_or_too_big_to_ship_fails(
    package: dict[str, Any], names: list[str]
) -> None:
    verdict = judge(make_evaluation(), package=PACKAGE | package)
    assert failed(verdict) == names
    told = {c["name"]: c["why"] for c in verdict["checks"]}
    if names == ["latency"]:
        assert "at most 500 ms" in told["latency"]
    assert failed(judge(make_evaluation(), package={})) == ["latency", "size"]
