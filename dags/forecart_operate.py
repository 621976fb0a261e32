"""DAGs beside the training: deploy a new champion, return to the last, evaluate over past dates.

Variables of the environment that matter:
    FORECART_HOME: the project's folder; by default the one that this file lies in.
    FORECART_DEPLOY: what to run when there is a new champion, as a JSON list of arguments.
    FORECART_GIT_REMOTE: set where workers share no disk; see forecart_train.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, Param, dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from pipelines import workspace
from pipelines.errors import UserError
from pipelines.processes import Command

HOME = Path(os.environ.get("FORECART_HOME") or Path(__file__).resolve().parents[1])
CHAMPION = Asset("champion", uri="forecart://champion")
RETRY_DELAY = timedelta(seconds=10)
OWNER = {"owner": "forecart"}
# Of the backtest's form.
FIELDS = ("folds", "step_days")


@task(retries=2, retry_delay=RETRY_DELAY)
def deploy(run_id: Any = None) -> None:
    """Run the command of FORECART_DEPLOY; it finds the champion's digest and version in variables.

    It may be run again for the same champion, so it has to be one that may.
    """
    if os.environ.get("FORECART_GIT_REMOTE"):
        # Another worker may have promoted it; other runs may do the same at this moment.
        code = Command(f"{HOME}:{run_id}:status").run(["forecart", "status"], HOME, {})
        if code:
            raise AirflowException(f"forecart status ended with code {code}")
    champion = json.loads((HOME / "champion.json").read_text())
    text = os.environ.get("FORECART_DEPLOY")
    if not text:
        raise AirflowSkipException("FORECART_DEPLOY is not set: nothing to run")
    try:
        command = json.loads(text)
    except ValueError:
        command = None
    if not (isinstance(command, list) and command and all(isinstance(c, str) for c in command)):
        # Not shown: it may hold a password.
        raise AirflowFailException("FORECART_DEPLOY: expected a JSON list of strings")
    variables = {
        "FORECART_CHAMPION_DIGEST": champion["digest"] or "",
        "FORECART_CHAMPION_VERSION": str(champion["version"] or ""),
    }
    code = Command(f"{HOME}:deploy").run(command, HOME, variables)
    if code:
        raise AirflowException(f"{command[0]} ended with code {code}")


@dag(
    dag_id="forecart_deploy",
    schedule=[CHAMPION],
    catchup=False,
    is_paused_upon_creation=False,
    max_active_runs=1,
    tags=["forecart"],
    default_args=OWNER,
    doc_md=(
        "Runs whenever a DAG has promoted a model or rolled one back: the command of the variable "
        "`FORECART_DEPLOY`, a JSON list of arguments, for example "
        '`["sh", "deploy.sh"]`. Skipped where it is not set. '
        "After `forecart promote` or `forecart rollback` on the command line, trigger it here."
    ),
)
def forecart_deploy() -> None:
    """One task."""
    deploy()


@task(outlets=[CHAMPION])
def roll_back() -> None:
    """Move the registry's alias back; once a run, so it is not retried by itself."""
    code = Command(f"{HOME}:rollback").run(["forecart", "rollback"], HOME, {})
    if code:
        raise AirflowException(f"forecart rollback ended with code {code}")


@dag(
    dag_id="forecart_rollback",
    schedule=None,
    catchup=False,
    is_paused_upon_creation=False,
    max_active_runs=1,
    tags=["forecart"],
    default_args=OWNER,
    doc_md="Returns to the champion before the present one. Nothing is trained.",
)
def forecart_rollback() -> None:
    """One task."""
    roll_back()


@task
def plan(params: dict[str, Any]) -> list[str]:
    """List the days that folds end at."""
    from pipelines.backtest import list_folds

    try:
        # Airflow takes any name from a call.
        workspace.refuse_unknown(params, FIELDS)
        return list_folds(HOME, folds=params["folds"], step_days=params["step_days"])
    except UserError as error:
        raise AirflowFailException(str(error)) from None


@task(retries=1, retry_delay=RETRY_DELAY, max_active_tis_per_dagrun=1)
def evaluate(until: str) -> dict[str, Any]:
    """Run the graph on what was known at that day."""
    from pipelines.backtest import run_fold

    try:
        return run_fold(HOME, until)
    except UserError as error:
        raise AirflowException(str(error)) from None


@task(trigger_rule="all_done")
def gather(days: list[str] | None, folds: Sequence[dict[str, Any]]) -> str:
    """Write reports/backtest.json; one fold that failed does not cost the others' hours."""
    from pipelines import backtest

    finished = list(folds or ())
    if not finished:
        raise AirflowFailException("no fold is finished; the logs of evaluate and plan say why")
    table = backtest.format_result(backtest.gather(HOME, finished))
    print(table)
    missing = set(days or ()) - {fold["until"] for fold in finished}
    if missing:
        raise AirflowFailException(
            f"{backtest.RESULT} lacks the folds that failed: {', '.join(sorted(missing))}"
        )
    return table


@dag(
    dag_id="forecart_backtest",
    schedule=None,
    catchup=False,
    is_paused_upon_creation=False,
    max_active_runs=1,
    render_template_as_native_obj=True,
    params={
        "folds": Param(4, type="integer", minimum=1, maximum=52, title="Folds"),
        "step_days": Param(
            14, type="integer", minimum=1, maximum=365, title="Days between their ends"
        ),
    },
    tags=["forecart"],
    default_args=OWNER,
    doc_md=(
        "Trains and evaluates as if today were an earlier day, many times (rolling origin). "
        "The comparison with LightGBM over all folds is in `reports/backtest.json`."
    ),
)
def forecart_backtest() -> None:
    """Folds are mapped tasks, known once the end of the log is."""
    days = plan(params="{{ params }}")
    gather(days, evaluate.expand(until=days))


DEPLOY = forecart_deploy()
ROLLBACK = forecart_rollback()
BACKTEST = forecart_backtest()
