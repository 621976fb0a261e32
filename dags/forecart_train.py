"""The training DAG: one task per stage of dvc.yaml, edges read from it.

Three variables of the environment matter:
    FORECART_HOME: the project's folder; by default the one that this file lies in.
    FORECART_POOLS: names of the Airflow pools that exist, with commas between them. A stage
        whose hint names another pool runs in the default one, because Airflow never starts a
        task whose pool is missing, and says so in the scheduler's log alone.
    PATH: need not hold DVC; the environment of the worker's own interpreter comes first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Param, dag
from airflow.sdk.exceptions import AirflowException

from pipelines.graph import Hints, Stage, load_graph

HOME = Path(os.environ.get("FORECART_HOME") or Path(__file__).resolve().parents[1])
POOLS = frozenset(filter(None, os.environ.get("FORECART_POOLS", "").split(",")))
RETRY_DELAY = timedelta(seconds=10)
# Set for a stage and inherited by all that it starts, so that what outlives its task is found.
MARKER = "FORECART_STAGE"


class StageOperator(BaseOperator):
    """Runs one stage under DVC, its output going to the task's log.

    Args:
        stage: a stage of dvc.yaml. Stages upstream have run, so DVC looks at this one alone.
        home: the project's folder.
    """

    def __init__(self, *, stage: str, home: str, **options: Any) -> None:
        super().__init__(**options)
        self.stage = stage
        self.home = home
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Mapping[str, Any]) -> None:
        """Run the stage to its end.

        What an earlier, killed attempt left running is ended first: DVC would refuse to touch
        paths that it still holds.

        Raises:
            AirflowException: the stage failed; the log above it says why.
        """
        command = ["dvc", "repro", "--single-item", self.stage]
        if context["params"]["force"]:
            command.append("--force")
        mark = f"{self.home}:{self.stage}"
        end_leftovers(mark)
        self._process = subprocess.Popen(
            command,
            cwd=self.home,
            env=stage_environment() | {MARKER: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            for line in self._process.stdout or ():
                print(line, end="", flush=True)
            code = self._process.wait()
        except BaseException:
            self.on_kill()
            self._process.wait()
            raise
        if code:
            raise AirflowException(f"stage {self.stage} ended with code {code}")

    def on_kill(self) -> None:
        """End the stage with its task, DVC's children too; Airflow would leave them running.

        Airflow calls this in a signal handler, in the midst of `execute`: it must not wait.
        """
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def end_leftovers(mark: str) -> None:
    """Kill every process that carries the mark, and wait until it is gone."""
    import psutil

    leftovers = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARKER) == mark:
                print(f"ending process {process.pid} of an earlier attempt", flush=True)
                process.kill()
                leftovers.append(process)
    psutil.wait_procs(leftovers, timeout=10)


def stage_environment() -> dict[str, str]:
    """This process's environment, with the commands of its interpreter first on the path."""
    binaries = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join(filter(None, [binaries, os.environ.get("PATH")])),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }


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


@dag(
    dag_id="forecart_train",
    schedule=None,
    catchup=False,
    # Nothing starts it but a person or a call, so it need not wait to be switched on.
    is_paused_upon_creation=False,
    # Stages share one checkout, and DVC lets one of them at a time into it.
    max_active_runs=1,
    max_active_tasks=1,
    params={
        "force": Param(
            False,
            type="boolean",
            title="Run every stage",
            description="Also stages whose inputs have not changed. All other settings are read "
            "from `params.yaml`.",
        )
    },
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
    graph = load_graph(HOME / "dvc.yaml")
    tasks = {
        stage.name: StageOperator(
            task_id=stage.name,
            stage=stage.name,
            home=str(HOME),
            doc_md=describe_stage(stage),
            **read_options(stage.hints),
        )
        for stage in graph.stages.values()
    }
    for up, down in sorted(graph.edges):
        tasks[up] >> tasks[down]


DAG = forecart_train()

if __name__ == "__main__":
    DAG.test()
