"""The training DAGs: one task per stage of dvc.yaml, edges read from it, then the promotion.

Every run works in a git worktree of its own and ends as a commit on a branch ``runs/<name>``.

Variables of the environment that matter:
    FORECART_HOME: the project's folder; by default the one that this file lies in.
    FORECART_POOLS: names of the Airflow pools that exist, with commas between them. A stage
        whose hint names another pool runs in the default one, because Airflow never starts a
        task whose pool is missing, and says so in the scheduler's log alone.
    FORECART_GIT_REMOTE: name of the git remote over which workers that share no disk pass a run
        on to each other, beside DVC's default remote; empty where all share FORECART_HOME.
    FORECART_KEEP_RUNS: workspaces of finished runs that stay, 5 by default.
    FORECART_MLFLOW: address of MLflow's pages, for links to them.
    FORECART_SCHEDULE: cron expression of the retraining, "0 3 * * *" by default.
    PATH: need not hold DVC; the environment of the worker's own interpreter comes first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    BaseOperator,
    BaseOperatorLink,
    CronTriggerTimetable,
    Param,
    TaskGroup,
    TriggerRule,
    dag,
    task,
    task_group,
)
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from pipelines import relay, workspace
from pipelines.errors import UserError
from pipelines.graph import Hints, Stage, load_graph
from pipelines.processes import Command

HOME = Path(os.environ.get("FORECART_HOME") or Path(__file__).resolve().parents[1])
POOLS = frozenset(filter(None, os.environ.get("FORECART_POOLS", "").split(",")))
REMOTE = os.environ.get("FORECART_GIT_REMOTE", "")
KEEP_RUNS = int(os.environ.get("FORECART_KEEP_RUNS") or 5)
MLFLOW = os.environ.get("FORECART_MLFLOW", "").rstrip("/")
SCHEDULE = os.environ.get("FORECART_SCHEDULE") or "0 3 * * *"
RETRY_DELAY = timedelta(seconds=10)
# What `forecart promote` reads of a run.
PROMOTED = ("models/gpt", "reports/verdict.json")

# Whoever collects events says so here: POST /api/v2/assets/events.
EVENTS = Asset("events", uri="forecart://events")
CHAMPION = Asset("champion", uri="forecart://champion")

# Fields of the trigger form and the keys of params.yaml that they set.
SETTINGS = {
    "source": "ingest.source",
    "path": "ingest.files.path",
    "until": "ingest.until",
    "users": "ingest.simulator.users",
    "days": "ingest.simulator.days",
    "device": "train.device",
    "epochs": "train.epochs",
}
FIELDS = (*SETTINGS, "require_approval", "force")
AS_SET = "Empty: as in params.yaml."
NOT_CHOSEN = {"null": "as in params.yaml"}


def make_params(*, require_approval: bool) -> dict[str, Param]:
    """The fields of the trigger form."""
    return {
        "source": Param(
            None,
            enum=[None, "simulator", "files", "database", "rest"],
            values_display=NOT_CHOSEN,
            title="Source of events",
            description="Tables, columns and addresses are those of params.yaml; of a database the "
            "address may be in the variable FORECART_STORE.",
        ),
        "path": Param(
            None,
            type=["null", "string"],
            maxLength=1000,
            title="Files",
            description=f"Path, folder, glob or URL, for the source files. {AS_SET}",
        ),
        "until": Param(
            None,
            type=["null", "string"],
            format="date",
            title="Until",
            description=f"Only events before this day (UTC) are read. {AS_SET}",
        ),
        "users": Param(
            None,
            type=["null", "integer"],
            minimum=50,
            maximum=10_000_000,
            title="Simulated shoppers",
            description=AS_SET,
        ),
        "days": Param(
            None,
            type=["null", "integer"],
            minimum=30,
            maximum=3650,
            title="Simulated days",
            description=AS_SET,
        ),
        "device": Param(
            None,
            enum=[None, "auto", "cpu", "cuda"],
            values_display=NOT_CHOSEN,
            title="Device of the training",
        ),
        "epochs": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            maximum=1000,
            title="Epochs",
            description=AS_SET,
        ),
        "require_approval": Param(
            require_approval,
            type="boolean",
            title="Ask before promotion",
            description="A person decides under Required Actions, once the verdict has passed.",
        ),
        "force": Param(
            False,
            type="boolean",
            title="Run every stage",
            description="Also stages whose inputs have not changed.",
        ),
    }


class StageOperator(BaseOperator):
    """Runs one stage under DVC in the run's workspace, its output going to the task's log.

    Args:
        stage: a stage of dvc.yaml. Stages upstream have run, so DVC looks at this one alone.
        home: the project's folder.
    """

    def __init__(self, *, stage: str, home: str, **options: Any) -> None:
        super().__init__(**options)
        self.stage = stage
        self.home = home
        self._command: Command | None = None

    def execute(self, context: Mapping[str, Any]) -> None:
        """Run the stage to its end.

        Raises:
            AirflowException: the stage failed; the log above it says why.
            AirflowFailException: the run's workspace is gone.
        """
        home = Path(self.home)
        if REMOTE:
            folder = workspace.locate(home, context["run_id"])
        else:
            folder = resume(home, context["run_id"])
        command, place = ["dvc", "repro", "--single-item", self.stage], folder
        if REMOTE:
            run = [f"--run={context['run_id']}", f"--remote={REMOTE}"]
            command, place = ["forecart", "stage", self.stage, *run], home
        if context["params"]["force"]:
            command.append("--force")
        self._command = Command(f"{folder}:{self.stage}")
        code = self._command.run(command, place, workspace.environment(home, place))
        if code:
            raise AirflowException(f"stage {self.stage} ended with code {code}")

    def on_kill(self) -> None:
        """End the stage with its task, DVC's children too; Airflow would leave them running.

        Airflow calls this in a signal handler, in the midst of `execute`: it must not wait.
        """
        if self._command is not None:
            self._command.kill()


def read_options(hints: Hints) -> dict[str, Any]:
    """A stage's orchestration hints as options of an operator."""
    options: dict[str, Any] = {"retries": hints.retries, "retry_delay": RETRY_DELAY}
    if hints.timeout_minutes is not None:
        options["execution_timeout"] = timedelta(minutes=hints.timeout_minutes)
    if hints.pool in POOLS:
        options["pool"] = hints.pool
    if hints.queue is not None:
        options["queue"] = hints.queue
    return options


def describe_stage(stage: Stage) -> str:
    """What the UI shows of a task, in Markdown."""
    lines = [stage.description, "", f"Runs `{stage.command}`.", ""]
    for title, values in (("Reads", stage.deps), ("Params", stage.params), ("Writes", stage.outs)):
        if values:
            lines.append(f"**{title}**: {', '.join(f'`{v}`' for v in values)}\n")
    return "\n".join(lines)


# Airflow gives a task its run's id by this name. A template would make a number of one that looks
# like a number.
@task(retries=2, retry_delay=RETRY_DELAY)
def prepare(params: dict[str, Any], live: bool, run_id: Any = None, dag_run: Any = None) -> str:
    """Make the run's workspace, with the settings of the form in its `params.yaml`."""
    changes = {key: params[field] for field, key in SETTINGS.items()}
    try:
        # Airflow takes any name from a call.
        workspace.refuse_unknown(params, FIELDS)
        if live:
            leave_out_today(changes, dag_run.run_after)
        if REMOTE:
            # Another worker may have promoted the champion.
            follow_registry(run_id)
            relay.start(HOME, run_id, changes, REMOTE)
            return f"{relay.REFS}{workspace.name_run(run_id)} on {REMOTE}"
        folder = workspace.prepare(HOME, run_id, changes)
    except UserError as error:
        # Trying again would find the same mistake.
        raise AirflowFailException(str(error)) from None
    print(f"workspace {folder}")
    return str(folder)


def resume(home: Path, run_id: str) -> Path:
    """Return the run's workspace to go on working in."""
    try:
        return workspace.resume(home, run_id)
    except UserError as error:
        # Trying again would not bring it back.
        raise AirflowFailException(str(error)) from None


def leave_out_today(changes: dict[str, Any], now: datetime) -> None:
    """Let the events of a live shop end with the last day that is over, unless an end is set.

    What is left of the day would count as silence, in the last windows above all.
    """
    from pipelines.config import PARAMS_FILE, load_params

    if changes["ingest.until"] is None and load_params(HOME / PARAMS_FILE).ingest.until is None:
        changes["ingest.until"] = f"{now.astimezone(UTC):%Y-%m-%d}"


def follow_registry(run_id: str) -> None:
    """Bring the checkout's champion, file and model, up to date with the registry."""
    # Other runs may do the same at this moment.
    command = Command(f"{workspace.locate(HOME, run_id)}:status")
    code = command.run(["forecart", "status"], HOME, workspace.environment(HOME, HOME))
    if code:
        raise AirflowException(f"forecart status ended with code {code}")


class ResultLink(BaseOperatorLink):
    """A button that leads to the training run in MLflow, which holds the report."""

    name = "Report and training run"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Return the address, empty where MLflow's is not known."""
        return operator.address if isinstance(operator, CommitOperator) else ""


class CommitOperator(BaseOperator):
    """Commits what was computed to the run's branch, and tells where the results are.

    Args:
        home: the project's folder.
    """

    operator_extra_links = (ResultLink(),)

    def __init__(self, *, home: str, **options: Any) -> None:
        super().__init__(**options)
        self.home = home
        self.address = ""

    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Commit; a second time nothing happens."""
        from pipelines.registry.verdict import VERDICT, read_verdict

        home, run_id = Path(self.home), context["run_id"]
        folder = workspace.locate(home, run_id)
        branch = relay.conclude(home, run_id, REMOTE) if REMOTE else workspace.commit(home, run_id)
        verdict: dict[str, Any] = {"passed": False, "checks": []}
        if (folder / VERDICT).exists():
            try:
                verdict = read_verdict(folder / VERDICT)
            except UserError as error:
                raise AirflowFailException(str(error)) from None
        for check in verdict["checks"]:
            print(f"{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['why']}")
        report = folder / "reports/index.html"
        self.address = attach_report(folder, report, verdict.get("candidate"))
        result = {
            "branch": branch,
            "report": str(report),
            "training": self.address or None,
            "passed": verdict["passed"],
            "candidate": verdict.get("candidate"),
            "why": "; ".join(check["why"] for check in verdict["checks"] if not check["passed"]),
        }
        print(json.dumps(result, indent=2))
        return result


def attach_report(folder: Path, report: Path, candidate: str | None) -> str:
    """Put the report beside its training run in MLflow.

    Returns:
        The address of the report there; empty without a run or a known address of MLflow.
    """
    if candidate is None or not report.exists():
        return ""
    from pipelines.registry.tracking import attach

    os.environ["MLFLOW_TRACKING_URI"] = workspace.environment(HOME, folder)["MLFLOW_TRACKING_URI"]
    place = attach(folder, candidate, [report])
    return f"{MLFLOW}/{place}/artifacts/{report.name}" if place and MLFLOW else ""


@task.branch
def verdict(result: dict[str, Any], params: dict[str, Any]) -> str:
    """Go on to the promotion when the gate has passed the model, over a person when asked for."""
    if not result["passed"]:
        print(f"the gate refuses this model: {result['why']}")
        return "promotion.outcome"
    return "promotion.approve" if params["require_approval"] else "promotion.promote"


@task(
    retries=2,
    retry_delay=RETRY_DELAY,
    outlets=[CHAMPION],
    trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
)
def promote(run_id: Any = None) -> str:
    """Make the model champion; the registry decides when two runs want to at once."""
    folder = relay.fetch(HOME, run_id, REMOTE, PROMOTED) if REMOTE else resume(HOME, run_id)
    variables = workspace.environment(HOME, folder)
    command = Command(f"{folder}:promote")
    code = command.run(["forecart", "promote"], folder, variables)
    if code:
        raise AirflowException(f"forecart promote ended with code {code}")
    follow_registry(run_id)
    return "promoted"


@task.branch(trigger_rule=TriggerRule.ALL_DONE)
def outcome(run_id: Any = None, ti: Any = None) -> str:
    """Say how the run ended, and remove the workspaces of old ones."""
    result = ti.xcom_pull(task_ids="commit")
    if result is None:
        states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[run_id])[run_id]
        failed = [name for name, state in states.items() if state == "failed"]
        raise AirflowException(f"failed: {', '.join(failed) or 'commit'}; the log there says why")
    promoted = ti.xcom_pull(task_ids="promotion.promote")
    for name in workspace.finish(HOME, run_id, keep=KEEP_RUNS):
        print(f"removed workspace {name}; its branch stays")
    if REMOTE:
        relay.end(HOME, run_id, REMOTE)
    if promoted:
        return "promotion.promoted"
    if not result["passed"]:
        print(f"refused: {result['why']}")
        return "promotion.refused"
    # A rejection skips the promotion, and leaves no result of its own.
    states = ti.get_task_states(dag_id=ti.dag_id, task_ids=["promotion.promote"], run_ids=[run_id])
    if states[run_id]["promotion.promote"] == "skipped":
        print("rejected; nothing was promoted")
        return "promotion.rejected"
    raise AirflowException("the model passed but was not promoted; the log of promote says why")


def build(*, live: bool) -> Any:
    """Make the function that builds the tasks and their edges; live: events go on coming in."""

    @task_group(group_id="promotion", tooltip="What becomes of the trained model")
    def promotion(result: Any) -> None:
        approve = ApprovalOperator(
            task_id="approve",
            # An answer within moments of the question, while the process that asked still ends,
            # is lost on Airflow, and the task fails: it asks again.
            retries=2,
            retry_delay=RETRY_DELAY,
            subject="Promote the model of {{ run_id }}?",
            body="The gate has passed it.\n\n"
            "- report: {{ ti.xcom_pull(task_ids='commit')['training'] or "
            "ti.xcom_pull(task_ids='commit')['report'] }}\n"
            "- branch: `{{ ti.xcom_pull(task_ids='commit')['branch'] }}`",
            doc_md="Waits for a person. Rejecting promotes nothing. An answer in the very first "
            "moments may be lost; it is then asked for again.",
        )
        chosen = verdict(result, params="{{ params }}")
        made = promote()
        ended = outcome()
        chosen >> approve >> made
        chosen >> made >> ended
        chosen >> ended
        for name, text in (
            ("promoted", "The model is champion."),
            ("rejected", "A person has rejected the model; nothing was promoted."),
            ("refused", "The gate has refused the model; the log of `outcome` says why."),
        ):
            ended >> EmptyOperator(task_id=name, doc_md=text)

    def build_tasks() -> None:
        graph = load_graph(HOME / "dvc.yaml")
        ready = prepare(params="{{ params }}", live=live)
        names = dict.fromkeys(stage.hints.group for stage in graph.stages.values())
        # Tasks keep the names of their stages.
        groups = {name: TaskGroup(name, prefix_group_id=False) for name in names if name}
        tasks = {
            stage.name: StageOperator(
                task_id=stage.name,
                stage=stage.name,
                home=str(HOME),
                doc_md=describe_stage(stage),
                task_group=groups.get(stage.hints.group or ""),
                **read_options(stage.hints),
            )
            for stage in graph.stages.values()
        }
        for up, down in sorted(graph.edges):
            tasks[up] >> tasks[down]
        result = CommitOperator(
            task_id="commit",
            home=str(HOME),
            retries=2,
            retry_delay=RETRY_DELAY,
            doc_md="Commits the results to the run's branch and tells where they are.",
        )
        for stage in tasks.values():
            if not stage.upstream_task_ids:
                ready >> stage
            if not stage.downstream_task_ids:
                stage >> result
        promotion(result.output)

    return build_tasks


OPTIONS: dict[str, Any] = {
    "catchup": False,
    # Runs have workspaces of their own. One that waits for a person counts as active.
    "max_active_runs": 4,
    # Stages of one run share its workspace, and DVC lets one at a time into it; on machines that
    # share nothing each has its own.
    "max_active_tasks": 4 if REMOTE else 1,
    "render_template_as_native_obj": True,
    "tags": ["forecart"],
    "default_args": {"owner": "forecart"},
}

DAG = dag(
    dag_id="forecart_train",
    schedule=None,
    # Nothing starts it but a person or a call, so it need not wait to be switched on.
    is_paused_upon_creation=False,
    params=make_params(require_approval=False),
    doc_md=(
        "Takes the shop's events to a newly trained model, and promotes it if it passes.\n\n"
        "The tasks are the stages of `dvc.yaml`; a stage that DVC knows the result of is skipped "
        "in a second or two. A run works in a folder of its own, `.forecart/runs/<name>`, with "
        "the code that is committed and the settings of the form; its results are committed to "
        "the branch `runs/<name>`. The task `commit` tells where report and verdict are."
    ),
    **OPTIONS,
)(build(live=False))()

RETRAIN = dag(
    dag_id="forecart_retrain",
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable(SCHEDULE, timezone="UTC"), assets=[EVENTS]
    ),
    is_paused_upon_creation=True,
    params=make_params(require_approval=True),
    doc_md=(
        "The same as `forecart_train`, every day and whenever the asset `events` says that there "
        "are new ones, up to the last midnight (UTC) unless an end is set. A person approves the "
        "promotion. Switch it on to use it."
    ),
    **OPTIONS,
)(build(live=True))()

if __name__ == "__main__":
    DAG.test()
