"""The DAGs under the real Airflow, offline, on a small DVC project of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from pipelines.config import Source, load_params
from pipelines.graph import load_graph
from pipelines.io import digest_directory, write_json
from pipelines.workspace import locate, prepare

ROOT = Path(__file__).resolve().parents[2]

STAGES = """
stages:
  first:
    cmd: python first.py
    deps: [first.py]
    outs: [a.txt]
    desc: Writes a.
    meta:
      airflow: {pool: gpu, timeout_minutes: 5}
  second:
    cmd: python second.py
    deps: [second.py, a.txt]
    outs: [b.txt]
  third:
    cmd: python second.py --twice
    deps: [a.txt, b.txt]
    outs: [c.txt]
"""


@pytest.fixture(scope="module")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("airflow")
    run_airflow(home, ROOT, "-m", "airflow", "db", "migrate")
    return home


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "first.py").write_text("print('the first speaks'); open('a.txt', 'w').write('a')")
    (tmp_path / "second.py").write_text(
        "import sys; name = 'c.txt' if sys.argv[1:] else 'b.txt'\n"
        "open(name, 'w').write(open('a.txt').read() * 2)"
    )
    (tmp_path / ".gitignore").write_text("/.forecart/\n*.txt\n")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True, env=environment(tmp_path, tmp_path))
    save(tmp_path)
    return tmp_path


def save(project: Path) -> None:
    """Commit everything: runs take the code that is committed."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for arguments in (("add", "--all"), (*identity, "commit", "--quiet", "--message", "Change")):
        subprocess.run(["git", *arguments], cwd=project, check=True)


def find_run(project: Path) -> Path:
    """The newest run's workspace."""
    runs = (project / ".forecart/runs").iterdir()
    return max(runs, key=lambda path: (path / ".forecart/.ready").stat().st_mtime)


def git(project: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=project, check=True, capture_output=True, text=True
    ).stdout


def environment(home: Path, project: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "FORECART_"))}
    return keep | {
        "PYTHONPATH": str(ROOT),
        "FORECART_HOME": str(project),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "DVC_NO_ANALYTICS": "1",
    }


def run_airflow(
    home: Path, project: Path, *arguments: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env=environment(home, project) | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


DAG_FILE = str(ROOT / "dags/forecart_train.py")
OPERATE_FILE = str(ROOT / "dags/forecart_operate.py")
LOAD = f"import runpy; module = runpy.run_path({DAG_FILE!r}, run_name='dag'); d = module['DAG'];"
RUN = (
    LOAD
    + """
for conf in {confs}:
    run = d.test(run_conf=conf)
    print("STATES", run.state, {{t.task_id: str(t.state) for t in run.get_task_instances()}})
    print("END OF RUN")
"""
)


def test_it_runs_offline_and_again_only_when_forced(airflow_home: Path, project: Path) -> None:
    code = RUN.format(confs=[{"force": False}, {"force": False}, {"force": True}])
    first, again, forced, _ = run_airflow(airflow_home, project, "-c", code).stdout.split(
        "END OF RUN"
    )
    assert (find_run(project) / "c.txt").read_text() == "aa"
    assert not (project / "c.txt").exists()
    assert all("STATES success" in out for out in (first, again, forced))
    assert "the first speaks" in first
    assert "the first speaks" not in again
    assert "the first speaks" in forced
    # Without a gate there is no verdict, and without a verdict no promotion.
    assert "'promotion.refused': 'success'" in first
    assert "'promotion.promote': 'skipped'" in first
    branches = git(project, "branch", "--list", "--format=%(refname:short)", "runs/*").split()
    assert len(branches) == 3


def test_workers_may_share_no_disk(airflow_home: Path, project: Path, tmp_path: Path) -> None:
    """Remotes of git and DVC take the place of the folder; one machine stands for all."""
    remote, store = tmp_path / ".forecart/remote.git", tmp_path / ".forecart/store"
    dvc = [
        sys.executable,
        "-m",
        "dvc",
        "remote",
        "add",
        "--quiet",
        "--default",
        "store",
        str(store),
    ]
    subprocess.run(dvc, cwd=project, check=True, env=environment(project, project))
    save(project)
    git(project, "init", "--quiet", "--bare", str(remote))
    git(project, "remote", "add", "origin", str(remote))
    home = {"FORECART_GIT_REMOTE": "origin", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    code = RUN.format(confs=[{"epochs": 3}])
    out = run_airflow(airflow_home, project, "-c", code, **home).stdout
    assert "STATES success" in out
    assert "the first speaks" in out
    # One branch with the results; nothing else of the run is left on the remote or here.
    (branch,) = git(remote, "for-each-ref", "--format=%(refname)").split()
    assert "c.txt" in git(remote, "show", f"{branch}:dvc.lock")
    assert "epochs: 3" in git(remote, "show", f"{branch}:params.yaml")
    assert [path.name for path in (project / ".forecart/runs").iterdir()] == [branch.split("/")[-1]]


def test_the_form_changes_the_params_of_its_run_alone(airflow_home: Path, project: Path) -> None:
    before = (project / "params.yaml").read_text()
    conf = {"users": 77, "epochs": 3, "until": "2025-03-01", "device": "cpu"}
    run_airflow(airflow_home, project, "-c", RUN.format(confs=[conf]))
    changed = find_run(project)
    text = (changed / "params.yaml").read_text()
    params = load_params(changed / "params.yaml")
    assert (params.ingest.simulator.users, params.train.epochs) == (77, 3)
    assert str(params.ingest.until).startswith("2025-03-01")
    assert "# Every setting of a run." in text
    assert (project / "params.yaml").read_text() == before
    branch = f"runs/{changed.name}"
    assert git(project, "show", f"{branch}:params.yaml") == text
    assert "c.txt" in git(project, "show", f"{branch}:dvc.lock")
    assert git(project, "status", "--short") == ""


def test_a_wrong_value_runs_no_stage(airflow_home: Path, project: Path) -> None:
    code = RUN.format(confs=[{"until": "1999-02-31"}])
    result = run_airflow(airflow_home, project, "-c", code, check=False)
    text = result.stdout + result.stderr
    assert "STATES success" not in text
    assert "until" in text
    assert "the first speaks" not in text


def test_a_day_that_is_not_over_is_left_out_of_a_daily_run(
    airflow_home: Path, project: Path
) -> None:
    code = LOAD + (
        "from datetime import datetime, timedelta, timezone\n"
        "now = datetime(2025, 6, 19, 1, tzinfo=timezone(timedelta(hours=2)))\n"
        "for until in (None, '2025-06-01'):\n"
        "    changes = {'ingest.until': until}\n"
        "    module['leave_out_today'](changes, now)\n"
        "    print('UNTIL', changes['ingest.until'])\n"
        "prepares = [module[name].task_dict['prepare'] for name in ('DAG', 'RETRAIN')]\n"
        "print('LIVE', [task.op_kwargs['live'] for task in prepares])\n"
    )
    run = LOAD + "module['RETRAIN'].test(run_conf={'require_approval': False})"
    run_airflow(airflow_home, project, "-c", run)
    until = load_params(find_run(project) / "params.yaml").ingest.until
    assert until is not None and timedelta() <= datetime.now(UTC) - until < timedelta(days=2)
    out = run_airflow(airflow_home, project, "-c", code).stdout
    assert [line for line in out.splitlines() if line.startswith("UNTIL")] == [
        "UNTIL 2025-06-18",
        "UNTIL 2025-06-01",
    ]
    assert "LIVE [False, True]" in out
    file = project / "params.yaml"
    file.write_text(file.read_text().replace("until: null", "until: 2025-05-01"))
    assert "UNTIL None" in run_airflow(airflow_home, project, "-c", code).stdout


def test_an_unknown_key_runs_no_stage_and_what_failed_is_named(
    airflow_home: Path, project: Path
) -> None:
    code = RUN.format(confs=[{"nosuch": 1, "epoch": 7, "users": 77}])
    result = run_airflow(airflow_home, project, "-c", code, check=False)
    text = result.stdout + result.stderr
    assert "unknown in conf: epoch, nosuch; there are source, path" in text
    assert "failed: prepare; the log there says why" in text
    assert "STATES success" not in text
    assert "the first speaks" not in text


def test_a_failing_stage_fails_the_run_and_is_told(airflow_home: Path, project: Path) -> None:
    (project / "second.py").write_text("raise SystemExit('the second gave up')")
    save(project)
    result = run_airflow(airflow_home, project, "-c", RUN.format(confs=[{}]), check=False)
    text = result.stdout + result.stderr
    assert "the second gave up" in text
    assert "stage second ended with code" in text
    assert "failed: second; the log there says why" in text
    assert "STATES success" not in text
    assert (find_run(project) / "a.txt").exists()
    assert not (find_run(project) / "c.txt").exists()


# The run's name is Airflow's to make.
NAMED = (
    "from airflow.models.dagrun import DagRun;"
    "DagRun.generate_run_id = staticmethod(lambda **_: {run_id!r});"
)


def test_a_run_may_be_named_like_a_number(airflow_home: Path, project: Path) -> None:
    code = NAMED.format(run_id="20250601") + RUN.format(confs=[{}])
    out = run_airflow(airflow_home, project, "-c", code).stdout
    assert "STATES success" in out
    assert (locate(project, "20250601") / "c.txt").exists()


def test_variables_that_are_set_to_nothing_are_as_unset(airflow_home: Path) -> None:
    code = LOAD + "print('KEEP', module['KEEP_RUNS'])"
    nothing = {"FORECART_KEEP_RUNS": "", "FORECART_SCHEDULE": "", "FORECART_POOLS": ""}
    assert "KEEP 5" in run_airflow(airflow_home, ROOT, "-c", code, **nothing).stdout


def test_a_promoted_model_reaches_the_checkout(airflow_home: Path, project: Path) -> None:
    """A service that watches the checkout's champion.json takes the files from beside it."""
    folder = prepare(project, "one", {})
    (folder / "models/gpt").mkdir(parents=True)
    (folder / "models/gpt/model.safetensors").write_text("weights")
    write_json(folder / "models/gpt/config.json", {"targets": [{"name": "purchase_14d"}]})
    write_json(folder / "data/features/cuts.json", {})
    digest = digest_directory(folder / "models/gpt")
    check = {"name": "quality", "passed": True, "why": "good"}
    write_json(
        folder / "reports/verdict.json",
        {"passed": True, "checks": [check], "candidate": digest, "champion": None},
    )
    # The run was over, and somebody has cleared the task.
    (folder / ".forecart/.finished").touch()
    code = LOAD + "module['promote'].function(run_id='one')"
    run_airflow(airflow_home, project, "-c", code)
    assert not (folder / ".forecart/.finished").exists()
    assert json.loads((project / "champion.json").read_text())["digest"] == digest
    fetched = project / ".forecart/models" / digest.removeprefix("sha256:")
    assert digest_directory(fetched) == digest


def test_a_verdict_that_no_gate_wrote_is_not_acted_on(airflow_home: Path, project: Path) -> None:
    folder = prepare(project, "one", {})
    write_json(folder / "reports/verdict.json", {"passed": True, "checks": {}})
    code = (
        LOAD + "module['CommitOperator'](home={!r}, task_id='commit').execute({{'run_id': 'one'}})"
    )
    done = run_airflow(airflow_home, project, "-c", code.format(str(project)), check=False)
    assert done.returncode != 0
    assert "verdict.json: not as the gate wrote it" in done.stderr


# Two commands with one mark are two attempts of one task: the second ends the first.
MARKS = (
    LOAD
    + """
operate = runpy.run_path({file!r}, run_name="dag")
marks = []

class Command:
    def __init__(self, mark):
        marks.append(mark)

    def run(self, *_):
        return 0

for file, act in ((module, module["follow_registry"]), (operate, operate["deploy"].function)):
    act.__globals__["Command"] = Command
    for run_id in ("one", "two", "one"):
        try:
            act(run_id=run_id)
        except file["AirflowException"]:
            pass
print("MARKS", marks)
"""
)


def test_runs_that_do_the_same_at_once_do_not_end_each_other(
    airflow_home: Path, project: Path
) -> None:
    write_json(project / "champion.json", {"digest": None, "version": None, "verdict": None})
    code = MARKS.format(file=OPERATE_FILE)
    out = run_airflow(airflow_home, project, "-c", code, FORECART_GIT_REMOTE="origin").stdout
    one, two, again, *deploys = ast.literal_eval(out.split("MARKS ")[1].splitlines()[0])
    assert one == again
    assert deploys[0] == deploys[2]
    assert len({one, two, *deploys}) == 4


SLOW = """
import os, pathlib, time
if pathlib.Path("slow").exists():
    pathlib.Path("new").write_text(str(os.getpid()))
    pathlib.Path("new").rename("pid")
    time.sleep(60)
pathlib.Path("a.txt").write_text("a")
"""
# Airflow's task runner answers SIGTERM with the task's on_kill, in the midst of execute.
EXECUTE = (
    LOAD
    + """
import signal
task = d.task_dict["first"]
signal.signal(signal.SIGTERM, lambda *_: task.on_kill())
context = {"params": {"force": False}, "run_id": "slow"}
module["StageOperator"].execute.__wrapped__(task, context)
"""
)


def start_slow_stage(home: Path, project: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a task whose stage sleeps; the task's process, and the stage's id."""
    (project / "first.py").write_text(SLOW)
    save(project)
    folder = prepare(project, "slow", {})
    (folder / "slow").touch()
    task = subprocess.Popen(
        [sys.executable, "-c", EXECUTE],
        cwd=home,
        env=environment(home, project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert task.poll() is None, task.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return task, int((folder / "pid").read_text())


def is_running(pid: int) -> bool:
    # A dead process whose new parent has not asked for its exit code yet still has its id.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stopped_task_takes_its_stage_along(airflow_home: Path, project: Path) -> None:
    task, stage = start_slow_stage(airflow_home, project)
    task.terminate()
    _, errors = task.communicate(timeout=20)
    assert "stage first ended with code -9" in errors
    assert not is_running(stage)


def test_a_retry_ends_what_a_killed_task_left_running(airflow_home: Path, project: Path) -> None:
    task, stage = start_slow_stage(airflow_home, project)
    task.kill()
    task.wait()
    assert is_running(stage)
    (locate(project, "slow") / "slow").unlink()
    run_airflow(airflow_home, project, "-c", EXECUTE)
    assert (locate(project, "slow") / "a.txt").read_text() == "a"
    assert not is_running(stage)


def test_a_cleared_task_of_a_finished_run_keeps_the_workspace_or_says_that_it_is_gone(
    airflow_home: Path, project: Path
) -> None:
    folder = prepare(project, "slow", {})
    mark = folder / ".forecart/.finished"
    mark.touch()
    run_airflow(airflow_home, project, "-c", EXECUTE)
    assert (folder / "a.txt").exists()
    assert not mark.exists()
    shutil.rmtree(folder)
    failed = run_airflow(airflow_home, project, "-c", EXECUTE, check=False)
    told = f"AirflowFailException: {folder}: the workspace is gone; clear the task prepare, too"
    assert failed.stderr.strip().splitlines()[-1].endswith(told)


def test_its_edges_are_the_graphs(airflow_home: Path) -> None:
    code = LOAD + (
        "print('EDGES', sorted((t.task_id, n) for t in d.tasks for n in t.downstream_task_ids));"
        "print('DOCS', all(t.doc_md for t in d.tasks) and bool(d.doc_md))"
    )
    out = run_airflow(airflow_home, ROOT, "-c", code).stdout
    edges = ast.literal_eval(out.split("EDGES ")[1].splitlines()[0])
    graph = load_graph(ROOT / "dvc.yaml")
    assert [e for e in edges if set(graph.stages).issuperset(e)] == sorted(graph.edges)
    assert ("prepare", "fingerprint") in edges
    assert ("gate", "commit") in edges
    assert "DOCS True" in out


def test_the_form_offers_every_source(airflow_home: Path) -> None:
    code = LOAD + "print('SOURCES', d.params.get_param('source').schema['enum'])"
    out = run_airflow(airflow_home, ROOT, "-c", code).stdout
    assert f"SOURCES {[None, *map(str, Source)]}" in out


def test_a_pool_is_used_where_it_exists(airflow_home: Path, project: Path) -> None:
    show = "print('POOL', d.task_dict['first'].pool, d.task_dict['second'].pool);"
    code = f"{LOAD}{show} import os; os.environ['FORECART_POOLS'] = 'cpu,gpu'; {LOAD}{show}"
    out = run_airflow(airflow_home, project, "-c", code).stdout
    assert "POOL default_pool default_pool" in out
    assert "POOL gpu default_pool" in out


# One process for all: Airflow's start takes longer than they do.
OPERATE = """
import json, os, runpy, sys
module = runpy.run_path({file!r}, run_name="dag")

def run(name, **conf):
    done = module[name].test(run_conf=conf)
    print("STATES", done.state, [str(t.state) for t in done.get_task_instances()])
    print("END OF RUN", file=sys.stderr)
    print("END OF RUN")

run("DEPLOY")
show = "import os; print('NOW', os.environ['FORECART_CHAMPION_VERSION'])"
for command in ([sys.executable, "-c", show], [sys.executable, "-c", "exit(3)"], "kubectl rollout"):
    os.environ["FORECART_DEPLOY"] = json.dumps(command)
    run("DEPLOY")
os.remove(os.path.join(os.environ["FORECART_HOME"], "champion.json"))
run("ROLLBACK")
run("BACKTEST", folds=2)

from pipelines import backtest
from pipelines.errors import UserError
def fold(home, until):
    if until == "2025-05-01":
        raise UserError("it is broken")
    values = dict(roc_auc=dict(ensemble=0.8, lightgbm=0.7))
    return dict(until=until, users=9, targets=dict(purchase_14d=values))
backtest.list_folds = lambda home, folds, step_days: ["2025-06-01", "2025-05-01", "2025-04-01"]
backtest.run_fold = fold
run("BACKTEST", folds=3)
run("BACKTEST", fold=3)
"""


def test_what_is_done_beside_the_training(airflow_home: Path, project: Path) -> None:
    champion = {"digest": "sha256:" + "0" * 64, "version": 4, "verdict": None}
    (project / "champion.json").write_text(json.dumps(champion))
    result = run_airflow(
        airflow_home, project, "-c", OPERATE.format(file=OPERATE_FILE), check=False
    )
    parts = [
        out + err
        for out, err in zip(
            result.stdout.split("END OF RUN"), result.stderr.split("END OF RUN"), strict=True
        )
    ]
    assert len(parts) == 9, result.stdout + result.stderr
    unset, deployed, broken, damaged, rolled_back, backtested, partly, misspelt, _ = parts
    assert "STATES success ['skipped']" in unset
    assert "NOW 4" in deployed
    assert "STATES success ['success']" in deployed
    assert "ended with code 3" in broken
    assert "expected a JSON list" in damaged
    assert "kubectl" not in damaged  # it may hold a password
    assert "there is no champion to roll back" in rolled_back
    assert "dvc repro features" in backtested
    assert "lacks the folds that failed: 2025-05-01" in partly
    assert "unknown in conf: fold; there are folds, step_days" in misspelt
    kept = json.loads((project / "reports/backtest.json").read_text())
    assert [fold["until"] for fold in kept["folds"]] == ["2025-06-01", "2025-04-01"]
    failed = (broken, damaged, rolled_back, backtested, partly, misspelt)
    assert all("STATES success" not in part for part in failed)


# The first load pays for airflow.sdk's own lazy imports, the later ones are the files' own time.
PARSE = """
import runpy, sys, time, airflow.sdk
from airflow.sdk import *
from airflow.providers.standard.operators import empty, hitl
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from tests.speed import slowness

def load():
    started = time.process_time()
    for file in {files}:
        runpy.run_path(file, run_name="dag")
    return time.process_time() - started

before = set(sys.modules)
load()
print("SECONDS", min(load() for _ in range(5)) / slowness())
heavy = {{"mlflow", "torch", "pandas", "dvc", "bentoml", "ibis", "numpy", "pydantic"}}
print("HEAVY", sorted(heavy & (set(sys.modules) - before)))
"""


def test_parsing_it_is_light(airflow_home: Path) -> None:
    code = PARSE.format(files=[DAG_FILE, OPERATE_FILE])
    out = run_airflow(airflow_home, ROOT, "-c", code).stdout
    assert "HEAVY []" in out
    assert float(out.split("SECONDS ")[1].split()[0]) < 0.1
