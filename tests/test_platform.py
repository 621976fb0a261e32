from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.platform import USER, _make_login, _read_port


@pytest.mark.parametrize("text", ["many", "²", "", "0", "65536", "-1", "9" * 5000])
def test_a_port_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FORECART_AIRFLOW_PORT", text)
    with pytest.raises(UserError, match=r"FORECART_AIRFLOW_PORT=.*: not a port number"):
        _read_port("airflow", 8080)


def test_a_port_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _read_port("airflow", 8080) == 8080
    monkeypatch.setenv("FORECART_AIRFLOW_PORT", "65535")
    assert _read_port("airflow", 8080) == 65535


def test_the_login_is_drawn_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    login = _make_login(tmp_path)
    assert _make_login(tmp_path) == login
    assert list(login) == [USER]
    (file,) = (tmp_path / "airflow").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    # As a full disk leaves it.
    file.write_text("")
    assert len(_make_login(tmp_path)[USER]) == len(login[USER])
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("{")
    with pytest.raises(UserError, match=f"{file}, line 1: not valid JSON"):
        _make_login(tmp_path)
