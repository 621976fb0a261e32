"""The gate: may the candidate become champion? A pure function of reports and policy.

Every check says what was measured, where the limit lies and why it passed or failed, in words
for people who do not read code. What was not measured fails: a missing number is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from pipelines.config import Gate
from pipelines.evaluation.rivals import CANDIDATE, CHAMPION, find_best_baseline

# Rules that any model worth serving beats; both ignore everything but the base rate or the
# time of the last event.
FLOORS: Final = ("majority", "recency")

_HIGHER_IS_BETTER: Final = frozenset({"roc_auc", "pr_auc"})


@dataclass(frozen=True, kw_only=True)
class Check:
    """One reason for or against the candidate.

    Attributes:
        name: what was checked, stable across runs.
        passed: whether the candidate holds it.
        value: what was measured; None where nothing was.
        limit: what the value is held against.
        why: one sentence for people.
    """

    name: str
    passed: bool
    value: float | bool | str | None
    limit: float | bool | str | None
    why: str


def decide(
    evaluation: dict[str, Any],
    validation: dict[str, Any],
    package: dict[str, Any],
    policy: Gate,
    *,
    candidate: str,
    champion: str | None,
    data: str,
) -> dict[str, Any]:
    """Judge the candidate.

    Without a champion it has to beat the rules of thumb by interval, and may not be worse than
    the best baseline by more than the margin; with one, the same margin holds against the
    champion, and its calibration may not be worse. Where the champion itself surely is worse than
    LightGBM by more than the margin, as one of another shop's data is, or does not predict what
    is judged, the best baseline counts as well. "Not worse" is a test of non-inferiority: the
    whole paired interval lies above minus the margin, so that a wide interval (too little data)
    fails.

    Args:
        evaluation: reports/evaluation.json.
        validation: reports/validation.json.
        package: reports/package.json.
        policy: the ``gate`` section.
        candidate: digest of the candidate's files.
        champion: digest of the present champion's files, or None.
        data: digest of the data that both were scored on.

    Returns:
        reports/verdict.json.
    """
    checks = [_check_validation(validation)]
    target = evaluation.get("targets", {}).get(policy.primary_target)
    problem = _find_problem(target, policy)
    if target is None or problem is not None:
        why = problem or _explain_missing(evaluation, policy)
        checks.append(
            Check(
                name="primary_target",
                passed=False,
                value=None,
                limit=policy.primary_target,
                why=why,
            )
        )
    else:
        told = evaluation.get("champion", {}).get("targets", [policy.primary_target])
        rival = champion if policy.primary_target in told else None
        checks += _check_data(target, policy)
        checks += _check_calibration(target, policy, candidate=candidate, champion=rival)
        checks.append(_check_slices(target, policy, champion=rival))
        checks.append(_check_drift(evaluation, policy))
        if candidate != rival:
            checks += _check_floors(target, policy)
            if rival is None or _has_fallen(target, policy):
                checks.append(_check_best_baseline(target, policy))
        if champion is not None:
            why = f"the champion does not predict {policy.primary_target}"
            if evaluation.get("champion", {}).get("learnt_from_tests"):
                why = "the champion has learnt from the days that are tested here"
            same, missing = candidate == champion, why if rival is None else None
            checks.append(_check_champion(target, policy, same=same, missing=missing))
    checks += _check_package(package, policy, candidate=candidate)
    return {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "candidate": candidate,
        "champion": champion,
        "data": data,
    }


def _check_validation(validation: dict[str, Any]) -> Check:
    passed = validation.get("passed") is True
    return Check(
        name="validation",
        passed=passed,
        value=passed,
        limit=True,
        why="the data passed validation"
        if passed
        else "the data did not pass validation; see reports/data_docs",
    )


def _find_problem(target: dict[str, Any] | None, policy: Gate) -> str | None:
    """Say why a target cannot be judged, or None."""
    if target is None:
        return None
    if target.get("kind") != "binary":
        return (
            f"{policy.primary_target} is an amount, and {policy.primary_metric} needs a yes-or-no "
            "target; set gate.primary_target in params.yaml"
        )
    model = target.get("models", {}).get(CANDIDATE)
    if model is None or _read(model, policy.primary_metric) is None:
        return f"the candidate was not scored by {policy.primary_metric} on {policy.primary_target}"
    return None


def _explain_missing(evaluation: dict[str, Any], policy: Gate) -> str:
    present = ", ".join(sorted(evaluation.get("targets", {}))) or "none"
    reasons = {o["name"]: o["why"] for o in evaluation.get("omitted", [])}
    reason = f" ({reasons[policy.primary_target]})" if policy.primary_target in reasons else ""
    return (
        f"{policy.primary_target} was not evaluated{reason}; set gate.primary_target in "
        f"params.yaml to one of: {present}"
    )


def _check_data(target: dict[str, Any], policy: Gate) -> Iterator[Check]:
    """Is there enough to judge by?"""
    users, rate = int(target["users"]), float(target["base_rate"])
    positives = int(target.get("positives", round(users * rate)))
    yield Check(
        name="users",
        passed=users >= policy.min_users,
        value=users,
        limit=policy.min_users,
        why=f"{users:,} shoppers were scored; {policy.min_users:,} are needed to judge",
    )
    yield Check(
        name="positives",
        passed=positives >= policy.min_positives,
        value=positives,
        limit=policy.min_positives,
        why=f"{policy.primary_target} came true {positives:,} times; "
        f"{policy.min_positives:,} are needed to judge",
    )
    usual = policy.min_base_rate <= rate <= policy.max_base_rate
    yield Check(
        name="base_rate",
        passed=usual,
        value=rate,
        limit=f"{policy.min_base_rate:g} to {policy.max_base_rate:g}",
        why=f"{policy.primary_target} came true for {rate:.2%} of the shoppers"
        + ("" if usual else ", which looks like damaged data or a wrong target, not like a shop"),
    )


def _check_calibration(
    target: dict[str, Any], policy: Gate, *, candidate: str, champion: str | None
) -> Iterator[Check]:
    """Do predicted probabilities come true?"""
    ece = _read(target["models"][CANDIDATE], "ece")
    yield Check(
        name="calibration",
        passed=ece is not None and ece <= policy.max_ece,
        value=ece,
        limit=policy.max_ece,
        why="the candidate's calibration was not measured"
        if ece is None
        else f"predicted and observed shares differ by {ece:.4f} on average (ECE); "
        f"{policy.max_ece:g} is allowed",
    )
    if champion is None or candidate == champion:
        return
    before = _read(target["models"].get(CHAMPION, {}), "ece")
    limit = None if before is None else before + policy.ece_tolerance
    yield Check(
        name="calibration_against_champion",
        passed=ece is not None and limit is not None and ece <= limit,
        value=ece,
        limit=limit,
        why="the champion was not scored on this data, so calibration cannot be compared"
        if before is None
        else f"the champion's ECE is {before:.4f}; {policy.ece_tolerance:g} more is allowed",
    )


def _check_slices(target: dict[str, Any], policy: Gate, *, champion: str | None) -> Check:
    """Does any group of shoppers surely lose? Groups too small to judge are passed over."""
    rival = CHAMPION if champion is not None else "lightgbm"
    groups: dict[str, Any] | None = target.get("slices")
    if groups is None:
        return Check(
            name="slices",
            passed=False,
            value=None,
            limit=-policy.slice_margin,
            why=f"groups of shoppers were not compared on {policy.primary_target}; run evaluate "
            "again",
        )
    lost: dict[str, float] = {}
    judged = 0
    for name, group in groups.items():
        high = group["paired"].get(f"{CANDIDATE}-{rival}", {}).get("high")
        enough = group["rows"] >= policy.min_users and group["positives"] >= policy.min_positives
        if high is None or not enough:
            continue
        judged += 1
        if high < -policy.slice_margin:
            lost[name] = high
    worst = min(lost.values(), default=None)
    told = ", ".join(f"{name} ({high:+.3f} at best)" for name, high in sorted(lost.items()))
    return Check(
        name="slices",
        passed=not lost,
        value=worst,
        limit=-policy.slice_margin,
        why=f"of {judged} groups of shoppers these lose against {rival}: {told}"
        if lost
        else f"none of {judged} groups of shoppers surely loses more than "
        f"{policy.slice_margin:g} in roc_auc against {rival}",
    )


def _check_drift(evaluation: dict[str, Any], policy: Gate) -> Check:
    """Are the inputs still those that the model learned from?"""
    drift = evaluation.get("drift", {})
    share = drift.get("share")
    worst = ", ".join(entry["feature"].removeprefix("f_") for entry in drift.get("worst", [])[:3])
    return Check(
        name="drift",
        passed=share is not None and share <= policy.max_drifted_share,
        value=share,
        limit=policy.max_drifted_share,
        why="how the inputs changed was not measured"
        if share is None
        else f"{share:.0%} of {drift['features']} features shifted much since training "
        f"(most: {worst}); {policy.max_drifted_share:.0%} are allowed",
    )


def _check_package(package: dict[str, Any], policy: Gate, *, candidate: str) -> Iterator[Check]:
    """Is what would be shipped quick and small enough?"""
    measured = package if package.get("model") == candidate else {}
    missing = "the packaged model was not measured, or another one was"
    latency, size = measured.get("p99_at_most_ms"), measured.get("size_mb")
    yield Check(
        name="latency",
        passed=latency is not None and latency <= policy.max_latency_ms,
        value=latency,
        limit=policy.max_latency_ms,
        why=missing
        if latency is None
        else f"one shopper with 100 events takes at most {latency:g} ms (99th percentile); "
        f"{policy.max_latency_ms:g} ms are allowed",
    )
    yield Check(
        name="size",
        passed=size is not None and size <= policy.max_size_mb,
        value=size,
        limit=policy.max_size_mb,
        why=missing
        if size is None
        else f"the Bento has {size:g} MB; {policy.max_size_mb:g} MB are allowed",
    )


def _check_floors(target: dict[str, Any], policy: Gate) -> Iterator[Check]:
    """Does the candidate beat every rule of thumb for sure?"""
    for other in FLOORS:
        low = _read_gain(target, other, policy.primary_metric)
        passed = low is not None and low > 0
        yield Check(
            name=f"beats_{other}",
            passed=passed,
            value=low,
            limit=0.0,
            why=_explain_gain(low, other, policy, f"{'' if passed else 'not '}more than chance"),
        )


def _check_best_baseline(target: dict[str, Any], policy: Gate) -> Check:
    metric = policy.primary_metric
    best = find_best_baseline(target["models"], metric, higher=metric in _HIGHER_IS_BETTER)
    if best is None:
        return Check(
            name="not_worse_than_best_baseline",
            passed=False,
            value=None,
            limit=-policy.margin,
            why="no baseline was scored, so there is nothing to compare with",
        )
    return _check_margin(target, policy, best, "not_worse_than_best_baseline")


def _has_fallen(target: dict[str, Any], policy: Gate) -> bool:
    """Does the champion surely lose to LightGBM by more than the margin?"""
    gain = _read_ends(target, CHAMPION, "lightgbm", policy.primary_metric)
    return gain is not None and gain[1] < -policy.margin


def _check_champion(
    target: dict[str, Any], policy: Gate, *, same: bool, missing: str | None
) -> Check:
    """Compare with the champion, but for one that is the candidate or is missing for a reason."""
    if same or missing is not None:
        return Check(
            name="not_worse_than_champion",
            passed=True,
            value=0.0 if same else None,
            limit=-policy.margin,
            why="the candidate is the champion"
            if same
            else f"{missing}; the candidate is judged as a first one is",
        )
    return _check_margin(target, policy, CHAMPION, "not_worse_than_champion")


def _check_margin(target: dict[str, Any], policy: Gate, other: str, name: str) -> Check:
    low = _read_gain(target, other, policy.primary_metric)
    passed = low is not None and low >= -policy.margin
    if low is not None and low > 0:
        told = "better for sure"
    else:
        told = f"{'inside' if passed else 'outside'} the margin {policy.margin:g}"
    return Check(
        name=name,
        passed=passed,
        value=low,
        limit=-policy.margin,
        why=_explain_gain(low, other, policy, told),
    )


def _explain_gain(low: float | None, other: str, policy: Gate, verdict: str) -> str:
    if low is None:
        return f"the candidate was not compared with {other} by {policy.primary_metric}"
    return (
        f"against {other} the candidate's gain in {policy.primary_metric} is at least {low:+.4f}: "
        f"{verdict}"
    )


def _read(model: dict[str, Any], metric: str) -> float | None:
    """Return a metric's value; None where it is missing. With or without an interval."""
    value = model.get(metric)
    if isinstance(value, dict):
        value = value.get("value")
    return None if value is None else float(value)


def _read_gain(target: dict[str, Any], other: str, metric: str) -> float | None:
    """Return the lower end of the candidate's paired gain over another model."""
    ends = _read_ends(target, CANDIDATE, other, metric)
    return None if ends is None else ends[0]


def _read_ends(
    target: dict[str, Any], one: str, other: str, metric: str
) -> tuple[float, float] | None:
    """Return the interval of a model's paired gain over another.

    A pair a-b holds the interval of a minus b; which of both comes first is the report's choice.
    Where less is better, a model gains by being lower.
    """
    pairs = target.get("paired", {})
    sign = 1 if metric in _HIGHER_IS_BETTER else -1
    pair = pairs.get(f"{one}-{other}")
    if pair is None:
        pair, sign = pairs.get(f"{other}-{one}", {}), -sign
    ends = pair.get(metric) or {}
    low, high = ends.get("low"), ends.get("high")
    if low is None or high is None:
        return None
    return (float(low), float(high)) if sign > 0 else (-float(high), -float(low))
