from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.io import (
    digest_directory,
    guard_cells,
    progress,
    read_json,
    replace_directory,
    replace_file,
    write_json,
    write_text,
)


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1.5, "a": ["ü", None]})
    write_json(tmp_path / "b.json", {"a": ["ü", None], "b": 1.5})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": ["ü", None], "b": 1.5}


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_json_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes('{"a": "ü"}'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"^{file}: not UTF-8$"):
        read_json(file)


def test_json_that_is_nested_too_deep_is_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "champion.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"champion\.json: nested too deep"):
        read_json(file)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replace_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_threads_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    with ThreadPoolExecutor(1) as pool, replace_file(target) as partial:
        partial.write_text("mine")
        pool.submit(write_text, target, "another's").result()
    assert target.read_text() == "mine"


@pytest.mark.parametrize("sign", ["=", "+", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_no_cell_is_a_formula(sign: str) -> None:
    assert guard_cells([f"{sign}A1", f"a{sign}1", "-1.5"]) == [f"'{sign}A1", f"a{sign}1", "-1.5"]


def test_a_failed_directory_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with replace_directory(target) as partial:
        (partial / "f").write_text("old")
    with pytest.raises(RuntimeError), replace_directory(target) as partial:
        (partial / "g").write_text("half")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["f"]


def test_the_leavings_of_a_killed_process_are_not_used(tmp_path: Path) -> None:
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "stale").write_text("x")
    with replace_directory(tmp_path / "d") as partial:
        (partial / "f").write_text("new")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["f"]


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = digest_directory(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    second = digest_directory(tmp_path / "d")
    (tmp_path / "d" / "b").write_text("2")
    third = digest_directory(tmp_path / "d")
    assert len({first, second, third}) == 3
    assert first.startswith("sha256:")


def test_an_empty_directory_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        digest_directory(tmp_path / "none")


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
