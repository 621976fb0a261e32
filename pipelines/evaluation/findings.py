"""What the numbers say, in words: ahead, tied or behind, and how close to the ceiling."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pipelines.evaluation.metrics import HIGHER_IS_BETTER
from pipelines.evaluation.rivals import CANDIDATE, find_best_baseline


class Standing(StrEnum):
    """A model against another; ahead means that the interval excludes zero."""

    AHEAD = "ahead of"
    TIED = "tied with"
    BEHIND = "behind"
    UNKNOWN = "not comparable with"


def main_metric(target: dict[str, Any]) -> str:
    """The metric that stands for a target in short texts."""
    return "roc_auc" if target["kind"] == "binary" else "gini"


def find_difference(
    target: dict[str, Any], a: str, b: str, metric: str
) -> dict[str, float | None] | None:
    """The paired difference a - b of a metric, whichever way round it was written."""
    paired = target["paired"]
    if f"{a}-{b}" in paired:
        found: dict[str, float | None] = paired[f"{a}-{b}"][metric]
        return found
    if f"{b}-{a}" not in paired:
        return None
    other = paired[f"{b}-{a}"][metric]
    if other["diff"] is None:
        return dict(other)
    return {"diff": -other["diff"], "low": -other["high"], "high": -other["low"]}


def judge(target: dict[str, Any], a: str, b: str, metric: str) -> Standing:
    """Say how a stands against b."""
    found = find_difference(target, a, b, metric)
    if found is None or found["low"] is None or found["high"] is None:
        return Standing.UNKNOWN
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    low, high = sorted((sign * found["low"], sign * found["high"]))
    if low > 0:
        return Standing.AHEAD
    return Standing.BEHIND if high < 0 else Standing.TIED


def gap_closed(target: dict[str, Any], model: str, metric: str = "roc_auc") -> float | None:
    """Share of the way from chance (0.5) to the oracle that a model goes; None without oracle."""
    models = target["models"]
    if metric != "roc_auc" or "oracle" not in models or model not in models:
        return None
    value, ceiling = models[model][metric]["value"], models["oracle"][metric]["value"]
    if value is None or ceiling is None or ceiling <= 0.5:
        return None
    return float((value - 0.5) / (ceiling - 0.5))


def describe_target(name: str, target: dict[str, Any]) -> str:
    """One sentence on a target, with its numbers."""
    metric = main_metric(target)
    label = {"roc_auc": "ROC-AUC", "gini": "Gini"}[metric]
    models = target["models"]
    if CANDIDATE not in models or models[CANDIDATE][metric]["value"] is None:
        return f"{name}: only one outcome in the test window, so ranking metrics are undefined."
    sentence = f"{CANDIDATE} reaches {label} {models[CANDIDATE][metric]['value']:.3f}"
    found = _compare(target, "lightgbm", metric, "LightGBM")
    if found:
        sentence += f" and is {found}"
    best = find_best_baseline(models, metric, higher=HIGHER_IS_BETTER[metric])
    if best is not None and best != "lightgbm":
        found = _compare(target, best, metric, f"the best baseline, {best}")
        sentence += f"; it is {found}" if found else ""
    closed = gap_closed(target, CANDIDATE, metric)
    if closed is not None:
        sentence += f"; that is {closed:.0%} of the way from chance to the exact oracle"
    return sentence + "."


def _compare(target: dict[str, Any], other: str, metric: str, called: str) -> str:
    """Say how the candidate stands against a model, with the interval; empty: nobody knows."""
    found = find_difference(target, CANDIDATE, other, metric)
    if found is None or found["low"] is None:
        return ""
    return (
        f"{judge(target, CANDIDATE, other, metric)} {called} (difference {found['diff']:+.4f}, "
        f"interval {found['low']:+.4f} to {found['high']:+.4f})"
    )
