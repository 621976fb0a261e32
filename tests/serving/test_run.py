from __future__ import annotations

import os
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


def test_files_are_found_from_the_folder_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bento.yaml").touch()
    monkeypatch.setenv("FORECART_API_KEYS", "keys.txt")
    monkeypatch.setenv("FORECART_CHAMPION", "champion.json")
    monkeypatch.setenv("FORECART_STORE", "sqlite:///events.db")
    monkeypatch.setenv("FORECART_EXPORTS", f"scores{os.pathsep}lists/buyers.csv")
    _, environment = plan_server(tmp_path, host="127.0.0.1", port=4000)
    assert environment["FORECART_API_KEYS"] == str(tmp_path / "keys.txt")
    assert environment["FORECART_CHAMPION"] == str(tmp_path / "champion.json")
    assert environment["FORECART_STORE"] == f"sqlite:///{tmp_path / 'events.db'}"
    # Where a shopper who is erased would stay, unseen, in a folder that is not found.
    assert environment["FORECART_EXPORTS"].split(os.pathsep) == [
        str(tmp_path / "scores"),
        str(tmp_path / "lists/buyers.csv"),
    ]


def test_links_are_followed_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`current` may point to another release later."""
    (tmp_path / "bento.yaml").touch()
    (tmp_path / "releases/1").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/1")
    monkeypatch.setenv("FORECART_CHAMPION", "current/bento")
    monkeypatch.setenv("FORECART_API_KEYS", "current/keys.txt")
    _, environment = plan_server(tmp_path, host="127.0.0.1", port=4000)
    assert environment["FORECART_CHAMPION"] == str(tmp_path / "current/bento")
    assert environment["FORECART_API_KEYS"] == str(tmp_path / "current/keys.txt")


def test_an_empty_address_of_the_store_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bento.yaml").touch()
    monkeypatch.setenv("FORECART_STORE", "")
    _, environment = plan_server(tmp_path, host="127.0.0.1", port=4000)
    assert environment["FORECART_STORE"] == f"sqlite:///{tmp_path / '.forecart/events.db'}"


@pytest.mark.parametrize("url", ["postgresql+psycopg://shop@db/events", "sqlite:///:memory:"])
def test_other_stores_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    (tmp_path / "bento.yaml").touch()
    monkeypatch.setenv("FORECART_STORE", url)
    _, environment = plan_server(tmp_path, host="127.0.0.1", port=4000)
    assert environment["FORECART_STORE"] == url


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FORECART_PREDICTORS", "many"),
        ("FORECART_API_KEYS", "nowhere.json"),
        ("FORECART_HOSTS", "http://shop.example"),
        ("FORECART_HOSTS", "shop.example:3000"),
        ("FORECART_CHAMPION_SECONDS", "soon"),
        ("FORECART_CHAMPION_SECONDS", "1e10"),
        ("OTEL_TRACES_SAMPLER_ARG", "often"),
        ("FORECART_STORE", "nosuch"),
        ("FORECART_STORE", "sqlite:////proc/nowhere/events.db"),
    ],
)
def test_what_the_service_cannot_use_is_told_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    (tmp_path / "bento.yaml").touch()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("FORECART_CHAMPION", "champion.json")
    monkeypatch.setenv(name, value)
    # Of an address a driver may tell a part only: it may hold a password.
    told = name if name == "FORECART_STORE" else value
    with pytest.raises(UserError, match=told):
        serve(tmp_path)
