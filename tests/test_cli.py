from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipelines.cli import STAGES


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


def test_a_stage_without_its_input_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}\n")
    result = forecart("gate", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "reports/" in result.stderr
