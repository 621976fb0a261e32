from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from pipelines import cli
from pipelines.cli import STAGES
from pipelines.errors import UserError


def forecart(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_stage(tmp_path: Path) -> None:
    result = forecart("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(stage in result.stdout for stage in STAGES)


def test_a_mistake_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: {epocs: 3}\n")
    result = forecart("train", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "forecart: params.yaml: unknown key train.epocs\n"
    assert result.stdout == ""


def test_a_verdict_that_was_edited_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/verdict.json").write_text('{"passed": true}')
    result = forecart("summary", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "forecart: reports/verdict.json: not as the gate wrote it; run: dvc repro\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"data": {"events": "many", "users": 1}, "targets": {}, "omitted": []}',
        '{"data": {"events": 2, "users": 1, "first_ts": 5}, "targets": {}, "omitted": []}',
        '{"data": {}, "targets": [], "omitted": []}',
    ],
)
def test_an_evaluation_that_was_edited_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "reports").mkdir()
    verdict = '{"passed": false, "checks": [], "candidate": null, "champion": null}'
    (tmp_path / "reports/verdict.json").write_text(verdict)
    (tmp_path / "reports/evaluation.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    told = r"^reports/evaluation\.json: not as the stage evaluate wrote it; run: dvc repro$"
    with pytest.raises(UserError, match=told):
        cli.summary()


def test_a_library_that_the_system_lacks_is_one_line_with_its_package(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}\n")
    (tmp_path / "lightgbm.py").write_text(
        'raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")\n'
    )
    result = forecart("baselines", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "forecart: libgomp.so.1: cannot open shared object file: No such file or directory; "
        "LightGBM needs it (Debian: apt-get install libgomp1)\n"
    )


def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}\n")
    (tmp_path / "lightgbm.py").write_text(
        "import duckdb\n"
        "with duckdb.connect(config={'memory_limit': '10MB', 'temp_directory': ''}) as c:\n"
        "    c.execute('SELECT count(DISTINCT i) FROM range(9000000) t(i)')\n"
    )
    result = forecart("baselines", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("forecart: out of memory: ")
    assert result.stderr.count("\n") == 1


def test_a_stage_without_its_input_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}\n")
    result = forecart("gate", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "reports/" in result.stderr


def test_what_ails_mlflow_is_one_line_with_its_address_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        raise MlflowException("API request failed\nwith a long story")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@shop:5000")
    monkeypatch.setattr(cli, "app", act)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "forecart: MLflow at http://shop:5000: API request failed\n"


def test_the_database_of_another_library_is_not_said_to_be_mlflows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def act() -> None:
        raise OperationalError("SELECT 1", None, Exception())

    monkeypatch.setattr(cli, "app", act)
    with pytest.raises(OperationalError):
        cli.main()


def test_a_command_without_the_registry_does_not_import_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipelines import cli\n"
        "def act():\n"
        "    raise ValueError('a defect')\n"
        "cli.app = act\n"
        "try:\n"
        "    cli.main()\n"
        "except ValueError:\n"
        "    print('mlflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
