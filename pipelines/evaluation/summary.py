"""The comparison as a plain table for the terminal."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.findings import main_metric

_ORDER = (
    "oracle",
    "ensemble",
    "gpt",
    "champion",
    "lightgbm",
    "lstm",
    "logistic",
    "linear",
    "bgnbd",
    "density",
    "recency",
    "majority",
)

# Two of a kind share a column: one is for events, the other for amounts.
_COLUMN = {"logistic": "linear"}
_WIDTH = 110
# The share of positives, which the table has a column for: always .5.
_LEFT_OUT = frozenset({"majority"})


def order_models(names: Any) -> list[str]:
    """Model names, best known first."""
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def _target_order(item: tuple[str, dict[str, Any]]) -> tuple[bool, str, int]:
    name, target = item
    return target["kind"] != "binary", name.rpartition("_")[0], target["horizon_days"]


def format_summary(evaluation: dict[str, Any], verdict: dict[str, Any] | None) -> str:
    """Format models x targets and the verdict; the table is at most 110 columns wide.

    Args:
        evaluation: the content of reports/evaluation.json.
        verdict: the content of reports/verdict.json, if there is one.
    """
    data, targets = evaluation["data"], evaluation["targets"]
    lines = [
        f"{data['events']:,} events of {data['users']:,} users, "
        f"{data['first_ts'][:10]} to {data['last_ts'][:10]} ({data['source']})",
        "ROC-AUC (spend: Gini) out of time; base = share of positives",
        "",
    ]
    known = {_COLUMN.get(m, m) for t in targets.values() for m in t["models"]}
    models = order_models(known - _LEFT_OUT)
    first = max(len(name) for name in ("target", *targets)) + 1
    width = min(10, (_WIDTH - first - 6) // max(len(models), 1))
    heads = (f"{m[: width - 1]:>{width}}" for m in models)
    lines.append(f"{'target':<{first}}{'base':>6}" + "".join(heads))
    for name, target in sorted(targets.items(), key=_target_order):
        metric = main_metric(target)
        base = target["base_rate"] if target["kind"] == "binary" else None
        found = {_COLUMN.get(m, m): scores for m, scores in target["models"].items()}
        cells = [found.get(m, {}).get(metric, {}).get("value") for m in models]
        lines.append(
            f"{name:<{first}}"
            + (f"{base:>6.1%}" if base is not None else f"{'':>6}")
            + "".join(f"{c:>{width}.3f}" if c is not None else f"{'-':>{width}}" for c in cells)
        )
    lines += [f"left out: {note['name']} ({note['why']})" for note in evaluation["omitted"]]
    if verdict is not None:
        lines += ["", "Verdict: " + ("passed" if verdict["passed"] else "not passed")]
        lines += [
            f"  {'ok  ' if c['passed'] else 'FAIL'} {c['name']}: {c['why']}"
            for c in verdict["checks"]
        ]
    return "\n".join(lines)


def tell_next(verdict: dict[str, Any], champion: str | None) -> str:
    """Say what to do next.

    Args:
        verdict: the content of reports/verdict.json.
        champion: digest of the champion's files, None where there is none.
    """
    if champion is not None and verdict["candidate"] == champion:
        return ".venv/bin/forecart serve (this model is champion)"
    if verdict["passed"]:
        return ".venv/bin/forecart promote && .venv/bin/forecart serve"
    failed = ", ".join(c["name"] for c in verdict["checks"] if not c["passed"])
    return (
        f"not to be promoted ({failed}): more data, .venv/bin/forecart tune, or another limit "
        "under gate in params.yaml and .venv/bin/dvc repro gate"
    )
