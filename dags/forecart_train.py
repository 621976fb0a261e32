"""The training DAG: one task per stage of dvc.yaml, edges read from it."""

from __future__ import annotations

import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException

from pipelines.graph import Stage, load_graph

HOME = Path(os.environ.get("FORECART_HOME") or Path(__file__).resolve().parents[1])
GRAPH = load_graph(HOME / "dvc.yaml")


def run_stage(name: str, home: Path = HOME) -> None:
    """Run one stage under DVC, its output going to the task's log.

    Args:
        name: a stage of dvc.yaml. Stages upstream have run, so DVC looks at this one alone.
        home: the project's folder.

    Raises:
        AirflowException: the stage failed; the log above it says why.
    """
    process = subprocess.Popen(
        ["dvc", "repro", "--single-item", name],
        cwd=home,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
    except BaseException:
        # A timed out or killed task takes the stage with it, not DVC alone.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        code = process.wait()
    if code:
        raise AirflowException(f"stage {name} ended with code {code}")


def describe_stage(stage: Stage) -> str:
    """What the UI shows of a task, in Markdown."""
    lines = [stage.description, "", f"Runs `{stage.command}`.", ""]
    for title, values in (("Reads", stage.deps), ("Params", stage.params), ("Writes", stage.outs)):
        if values:
            lines.append(f"**{title}**: {', '.join(f'`{v}`' for v in values)}\n")
    return "\n".join(lines)


@dag(
    dag_id="forecart_train",
    schedule=None,
    catchup=False,
    # Stages share one checkout, and DVC lets one of them at a time into it.
    max_active_runs=1,
    max_active_tasks=1,
    doc_md=(
        "Takes the shop's events to a verdict on a newly trained model.\n\n"
        "The tasks are the stages of `dvc.yaml`; a stage whose inputs have not changed is skipped "
        "by DVC in about a second. The report is in `reports/index.html`, the verdict in "
        "`reports/verdict.json`; promote with `forecart promote`."
    ),
    tags=["forecart"],
)
def forecart_train() -> None:
    """Build the tasks and their edges."""
    tasks = {}
    for stage in GRAPH.stages.values():
        hints = stage.hints
        options = {"pool": hints.pool} if hints.pool else {}
        if hints.queue:
            options["queue"] = hints.queue
        tasks[stage.name] = task(
            task_id=stage.name,
            doc_md=describe_stage(stage),
            retries=hints.retries,
            retry_delay=timedelta(seconds=10),
            execution_timeout=(
                timedelta(minutes=hints.timeout_minutes) if hints.timeout_minutes else None
            ),
            **options,
        )(run_stage)(stage.name)
    for up, down in sorted(GRAPH.edges):
        tasks[up] >> tasks[down]


DAG = forecart_train()

if __name__ == "__main__":
    DAG.test()
