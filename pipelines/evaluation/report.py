"""reports/index.html: the comparison for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from pipelines.evaluation.charts import Line, line_chart
from pipelines.evaluation.findings import describe_target, find_difference, judge, main_metric
from pipelines.evaluation.metrics import HIGHER_IS_BETTER
from pipelines.evaluation.rivals import CANDIDATE
from pipelines.evaluation.summary import order_models
from pipelines.events import VERBS

# At most so many curves stay readable in one chart. Those of every report come first, so that they
# have the same colours in all.
PLOTTED: Final = (
    *("ensemble", "gpt", "lightgbm", "lstm", "oracle"),
    *("logistic", "linear", "density", "recency"),
)
_MAX_LINES: Final = 5
# Shares and figures below these are written with one decimal more, and with two.
_SMALL, _TINY = 0.01, 0.001

METRIC_NAMES: Final = {
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log loss",
    "brier": "Brier",
    "ece": "ECE",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "lift_at_10pct": "lift at 10 %",
    "mae": "mean abs. error",
    "gini": "Gini",
    "top_decile_capture": "top tenth captures",
    "total_ratio": "predicted / actual total",
    "hit_rate_at_10": "hit rate at 10",
    "ndcg_at_20": "NDCG at 20",
    "mrr_at_20": "MRR at 20",
}


def render_report(
    evaluation: dict[str, Any], curves: dict[str, list[dict[str, Any]]], *, settings: dict[str, Any]
) -> str:
    """Render the page.

    Args:
        evaluation: the content of reports/evaluation.json.
        curves: rows of pipelines.evaluation.curves by name: roc, pr, lift, calibration, spend.
        settings: bootstrap_samples, confidence, threshold, active_within_days,
            primary_horizon_days.

    Returns:
        One self-contained HTML document.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "days": format_days,
        "figure": format_figure,
        "percent": format_percent,
    }
    sections = [_describe(name, target, curves) for name, target in evaluation["targets"].items()]
    return environment.get_template("report.html").render(
        data=evaluation["data"],
        omitted=evaluation["omitted"],
        next_item=evaluation.get("next_item"),
        explanation=evaluation.get("explanation"),
        drift=evaluation.get("drift"),
        sections=sections,
        settings=settings,
        candidate=CANDIDATE,
        metric_names=METRIC_NAMES,
        higher=HIGHER_IS_BETTER,
    )


def _describe(
    name: str, target: dict[str, Any], curves: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    models = order_models(target["models"])
    metrics = [m for m in METRIC_NAMES if m in target["models"][models[0]]]
    main = main_metric(target)
    return {
        "name": name,
        "title": _title(name),
        "target": target,
        "sentence": describe_target(name, target),
        "models": models,
        "metrics": metrics,
        "main": main,
        "best": {m: _best(target, models, m) for m in metrics},
        "against": [
            {
                "model": m,
                "standing": str(judge(target, CANDIDATE, m, main)),
                "difference": find_difference(target, CANDIDATE, m, main),
            }
            for m in models
            if m != CANDIDATE
        ],
        "charts": _draw(name, target, curves),
    }


def _title(name: str) -> str:
    what, _, days = name.rpartition("_")
    words = {
        **{event: f"Will they {verb}" for event, verb in VERBS.items()},
        "churn": "Will they fall silent",
        "spend": "How much will they spend",
    }
    span = format_days(float(days.removesuffix("d")), one="day")
    return f"{words[what]} in the next {span}?"


def format_days(days: float, one: str = "1 day") -> str:
    """Say how many days, and ``one`` of a single one."""
    return one if days == 1 else f"{days:g} days"


def format_figure(value: float) -> str:
    """Write a figure with three decimals; of rare events, with four."""
    return f"{value:.4f}" if 0 < abs(value) < _SMALL else f"{value:.3f}"


def format_percent(share: float) -> str:
    """Write a share in percent, with more decimals where next to nobody, or everybody, is meant."""
    rest = min(share, 1.0 - share)
    decimals = 1 if rest <= 0 or rest >= _SMALL else 2 if rest >= _TINY else 3
    return f"{100 * share:.{decimals}f} %"


def _best(target: dict[str, Any], models: Sequence[str], metric: str) -> str | None:
    """Who leads in a metric.

    The oracle, which nobody can have, does not compete, nor does the majority rule, which gets a
    recall of 1 for calling everybody.
    """
    values = {
        m: target["models"][m][metric]["value"]
        for m in models
        if m not in ("oracle", "majority") and target["models"][m][metric]["value"] is not None
    }
    if not values:
        return None
    if metric == "total_ratio":
        return min(values, key=lambda m: abs(values[m] - 1))
    return (max if HIGHER_IS_BETTER[metric] else min)(values, key=lambda m: values[m])


def _draw(
    name: str, target: dict[str, Any], curves: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    shown = [m for m in PLOTTED if m in target["models"]][:_MAX_LINES]

    def lines(curve: str, x: str, y: str, *, dots: bool = False) -> list[Line]:
        rows = [r for r in curves[curve] if r["target"] == name]
        return [
            Line(name=m, points=[(r[x], r[y]) for r in rows if r["model"] == m], dots=dots)
            for m in shown
            if any(r["model"] == m for r in rows)
        ]

    def chart(title: str, drawn: list[Line], **options: Any) -> dict[str, Any]:
        drawing: Markup = line_chart(drawn, **options)
        return {"title": title, "svg": drawing, "names": [line.name for line in drawn]}

    unit = (0.0, 1.0)
    if target["kind"] == "amount":
        spend = lines("spend", "decile", "actual", dots=True)
        if not spend:
            return []
        top = max(y for line in spend for _x, y in line.points) or 1.0
        return [
            chart(
                "Actual spend by decile of the prediction",
                spend,
                x_label="decile, best first",
                y_label="mean spend",
                x_range=(1, 10),
                y_range=(0, top),
                x_steps=9,
            )
        ]
    calibration = lines("calibration", "predicted", "observed", dots=True)
    if not calibration:
        return []
    points = [p for line in calibration for p in line.points]
    reach = (0.0, max(0.1, *(max(p) for p in points)))
    lift_lines = lines("lift", "share", "lift")
    top_lift = max((y for line in lift_lines for _x, y in line.points), default=1.0)
    return [
        chart(
            "Calibration: does 20 % mean 20 %?",
            calibration,
            x_label="predicted",
            y_label="happened",
            x_range=reach,
            y_range=reach,
            diagonal=True,
        ),
        chart(
            "ROC",
            lines("roc", "false_positive_rate", "true_positive_rate"),
            x_label="false positive rate",
            y_label="true positive rate",
            x_range=unit,
            y_range=unit,
            diagonal=True,
        ),
        chart(
            "Precision and recall",
            lines("pr", "recall", "precision"),
            x_label="recall",
            y_label="precision",
            x_range=unit,
            y_range=unit,
        ),
        chart(
            "Lift: how much better than at random",
            lift_lines,
            x_label="share of shoppers reached",
            y_label="lift",
            x_range=unit,
            y_range=(0, top_lift),
        ),
    ]
