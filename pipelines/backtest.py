"""Rolling-origin evaluation: the whole pipeline as if today were an earlier day, many times.

Tashman (2000), "Out-of-sample tests of forecasting accuracy". Every fold is a run of the graph up
to ``evaluate`` with ``ingest.until`` moved back, in a workspace of its own; DVC knows the folds
that were computed before.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pipelines import workspace
from pipelines.config import PARAMS_FILE, load_params
from pipelines.errors import UserError
from pipelines.features.cuts import plan_cuts
from pipelines.io import read_json, take_lock, write_json
from pipelines.processes import Command

RESULT: Final = Path("reports/backtest.json")
CANDIDATE: Final = "ensemble"
RIVAL: Final = "lightgbm"
_FOLD: Final = "backtest-"
_LOCK: Final = workspace.RUNS / "backtest.lock"
_CUTS: Final = Path("data/features/cuts.json")
_METRICS: Final = {"binary": ("roc_auc", "ece"), "amount": ("gini", "total_ratio")}


def list_folds(home: Path, *, folds: int, step_days: int) -> list[str]:
    """Return the days (ISO) that the folds end at, the latest first.

    Args:
        home: the project's folder.
        folds: how many.
        step_days: between their ends.

    Raises:
        UserError: the features stage has run neither in the checkout nor in the workspace of a
            run, so that the end of the log is not known; or the log is too short for so many.
    """
    # A fold that was broken off ends before the log does.
    runs = [p for p in (home / workspace.RUNS).glob("*") if not p.name.startswith(_FOLD)]
    known = [path for path in (folder / _CUTS for folder in (home, *runs)) if path.exists()]
    if not known:
        raise UserError(
            f"{home / _CUTS}: no such file, so the end of the log is not known; "
            "run first: dvc repro features, or the DAG forecart_train"
        )
    newest = max(known, key=lambda path: path.stat().st_mtime)
    span = read_json(newest)
    first, end = (datetime.fromisoformat(span[key]) for key in ("first_ts", "end_ts"))
    days = [f"{end - timedelta(days=step_days * fold):%Y-%m-%d}" for fold in range(folds)]
    params = load_params(home / PARAMS_FILE)
    for fit, day in enumerate(days):
        until = datetime.fromisoformat(day).replace(tzinfo=UTC)
        try:
            plan_cuts(first, until, horizons_days=params.targets.horizons_days, params=params.cuts)
        except UserError as error:
            raise UserError(
                f"{fit} of {folds} folds, {step_days} days apart, fit into the log; ask for no "
                f"more, or for less between them. Until {day} {error}"
            ) from None
    return days


def run_folds(home: Path, days: Sequence[str]) -> dict[str, Any]:
    """Run folds one after the other; reports/backtest.json tells of those that are finished.

    Args:
        home: the project's folder.
        days: that the folds end at.

    Returns:
        The content of reports/backtest.json.

    Raises:
        UserError: a fold failed, and it says how many are finished; or another backtest runs.
    """
    result: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    with _run_alone(home):
        for until in days:
            try:
                found.append(_run_fold(home, until))
            except UserError as error:
                kept = f"; {RESULT} holds the {len(found)} before it" if found else ""
                raise UserError(f"{error}{kept}") from None
            result = gather(home, found)
    return result


def run_fold(home: Path, until: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the graph up to the evaluation on what was known at a day.

    Args:
        home: the project's folder.
        until: ISO day; events before it are read.
        changes: more dotted keys of params.yaml and values.

    Returns:
        ``{"until": ..., "targets": {name: {metric: {model: value}}}}``.

    Raises:
        UserError: a stage failed, and what it printed says why; or another backtest runs.
    """
    with _run_alone(home):
        return _run_fold(home, until, changes)


@contextmanager
def _run_alone(home: Path) -> Iterator[None]:
    """Keep out another backtest: it would take this one's processes for those of a killed attempt.

    Raises:
        UserError: another one runs. The lock of a killed one has gone with it.
    """
    path = home / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not take_lock(file.fileno()):
            raise UserError(f"a backtest runs already in {home}; wait until it has ended")
        yield


def _run_fold(home: Path, until: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    run_id = _FOLD + until
    # The code may have changed since the fold was made; what has not is in the cache.
    workspace.remove(home, workspace.locate(home, run_id))
    folder = workspace.prepare(
        home, run_id, {"train.compare": [], **(changes or {}), "ingest.until": until}
    )
    command = Command(f"{folder}:backtest")
    code = command.run(["dvc", "repro", "evaluate"], folder, workspace.environment(home, folder))
    if code:
        raise UserError(f"backtest: the fold until {until} ended with code {code}")
    found = summarise_fold(until, read_json(folder / "reports/evaluation.json"))
    workspace.remove(home, folder)
    return found


def summarise_fold(until: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what is compared over folds from an evaluation.json."""
    targets: dict[str, Any] = {}
    for name, target in evaluation["targets"].items():
        models = {m: target["models"][m] for m in (CANDIDATE, RIVAL) if m in target["models"]}
        targets[name] = {
            metric: {model: entry[metric]["value"] for model, entry in models.items()}
            for metric in _METRICS[target["kind"]]
        }
    return {"until": until, "users": evaluation["data"]["users"], "targets": targets}


def gather(home: Path, folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write reports/backtest.json: the folds, and means and spread of differences over them.

    Returns:
        Its content.
    """
    targets: dict[str, Any] = {}
    for name in dict.fromkeys(name for fold in folds for name in fold["targets"]):
        found = [fold["targets"][name] for fold in folds if name in fold["targets"]]
        metric = next(iter(found[0]))
        pairs = [
            (values[metric][CANDIDATE], values[metric][RIVAL])
            for values in found
            if None not in (values[metric].get(CANDIDATE), values[metric].get(RIVAL))
        ]
        if not pairs:
            continue
        differences = [ours - theirs for ours, theirs in pairs]
        targets[name] = {
            "metric": metric,
            "folds": len(pairs),
            CANDIDATE: statistics.fmean(ours for ours, _ in pairs),
            RIVAL: statistics.fmean(theirs for _, theirs in pairs),
            "difference": statistics.fmean(differences),
            "spread": statistics.stdev(differences) if len(pairs) > 1 else None,
            "ahead": sum(difference > 0 for difference in differences),
        }
    result = {"folds": list(folds), "targets": targets}
    write_json(home / RESULT, result)
    return result


def format_result(result: Mapping[str, Any]) -> str:
    """Return the table for people."""
    head = ("target", "metric", CANDIDATE, RIVAL, "difference", "spread", "ahead")
    rows = [head] + [
        (
            name,
            t["metric"],
            f"{t[CANDIDATE]:.4f}",
            f"{t[RIVAL]:.4f}",
            f"{t['difference']:+.4f}",
            "-" if t["spread"] is None else f"{t['spread']:.4f}",
            f"{t['ahead']} of {t['folds']}",
        )
        for name, t in result["targets"].items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
