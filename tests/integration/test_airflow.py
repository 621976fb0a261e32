"""The DAG under the real Airflow, offline, on a small DVC project of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.graph import load_graph

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
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True, env=environment(tmp_path, tmp_path))
    return tmp_path


def environment(home: Path, project: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FORECART_HOME": str(project),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "DVC_NO_ANALYTICS": "1",
    }


def run_airflow(
    home: Path, project: Path, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env=environment(home, project),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


RUN = """
import runpy
module = runpy.run_path({file!r}, run_name="dag")
run = module["DAG"].test()
print("STATES", run.state, {{t.task_id: str(t.state) for t in run.get_task_instances()}})
"""


def test_it_runs_offline(airflow_home: Path, project: Path) -> None:
    code = RUN.format(file=str(ROOT / "dags/forecart_train.py"))
    out = run_airflow(airflow_home, project, "-c", code).stdout
    assert (project / "c.txt").read_text() == "aa"
    assert "STATES success" in out
    assert "the first speaks" in out


def test_a_failing_stage_fails_the_run_and_is_told(airflow_home: Path, project: Path) -> None:
    (project / "second.py").write_text("raise SystemExit('the second gave up')")
    code = RUN.format(file=str(ROOT / "dags/forecart_train.py"))
    result = run_airflow(airflow_home, project, "-c", code, check=False)
    text = result.stdout + result.stderr
    assert "the second gave up" in text
    assert "stage second ended with code" in text
    assert "STATES success" not in text
    assert (project / "a.txt").exists()
    assert not (project / "c.txt").exists()


def test_its_edges_are_the_graphs(airflow_home: Path) -> None:
    code = (
        "import runpy; d = runpy.run_path({!r}, run_name='dag')['DAG'];"
        "print('EDGES', sorted((t.task_id, n) for t in d.tasks for n in t.downstream_task_ids));"
        "print('DOCS', all(t.doc_md for t in d.tasks) and bool(d.doc_md))"
    ).format(str(ROOT / "dags/forecart_train.py"))
    out = run_airflow(airflow_home, ROOT, "-c", code).stdout
    assert f"EDGES {sorted(load_graph(ROOT / 'dvc.yaml').edges)}" in out
    assert "DOCS True" in out


def test_parsing_it_is_light(airflow_home: Path) -> None:
    code = (
        "import airflow.sdk, sys, time, runpy; from airflow.sdk import dag, task;"
        "from airflow.sdk.exceptions import AirflowException; before = set(sys.modules);"
        "d = runpy.run_path({0!r}, run_name='dag'); t = time.perf_counter();"
        "d = runpy.run_path({0!r}, run_name='dag'); print('SECONDS', time.perf_counter() - t);"
        "heavy = {{'mlflow', 'torch', 'pandas', 'dvc', 'bentoml', 'ibis', 'numpy'}};"
        "print('HEAVY', sorted(heavy & (set(sys.modules) - before)))"
    ).format(str(ROOT / "dags/forecart_train.py"))
    out = run_airflow(airflow_home, ROOT, "-c", code).stdout
    assert "HEAVY []" in out
    assert float(out.split("SECONDS ")[1].split()[0]) < 0.1
