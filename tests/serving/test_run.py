from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from pipelines.errors import UserError
from serving.run import plan_server, serve


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENTOML_HOME", raising=False)


def test_a_bento_is_served_from_its_folder(tmp_path: Path) -> None:
    bento = tmp_path / "bento"
    bento.mkdir()
    (bento / "bento.yaml").touch()
    command, environment = plan_server(bento, host="127.0.0.1", port=4000)
    assert command[:4] == [sys.executable, "-m", "bentoml", "serve"]
    assert command[4:] == [str(bento), "--host", "127.0.0.1", "--port", "4000"]
    assert environment["BENTOML_DO_NOT_TRACK"] == "True"
    assert Path(environment["BENTOML_HOME"]).is_relative_to(tmp_path)


def test_a_model_is_served_by_the_projects_code(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    command, environment = plan_server(tmp_path, host="127.0.0.1", port=4000)
    assert "serving.service:Forecart" in command
    assert environment["FORECART_MODEL"] == str(tmp_path)
    assert environment["FORECART_EXPORTS"] == str(tmp_path / "data/scores")


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a Bento nor a model"):
        serve(tmp_path / "nothing")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "bento.yaml").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(tmp_path, port=port)
