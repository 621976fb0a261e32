"""An erased shopper is gone from the exports, whole or in the making, and nobody else is."""

from __future__ import annotations

import csv
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.io import write_json, write_table
from pipelines.scoring import write_csv
from serving import exports
from serving.exports import erase_exported, find_exports

USERS = ["ann", "=cmd()", "ünal, b", "Ann", "\uff1dcmd()"]


def make_scores(folder: Path) -> Path:
    scores = folder / "data/scores"
    for number, pair in enumerate((USERS[:2], USERS[2:4], USERS[4:])):
        table = pa.table({"user_id": pair, "purchase_14d": [0.25, 0.5][: len(pair)]})
        write_table(scores / f"part-{number}.parquet", table)
    write_json(scores / "_scores.json", {})
    return scores


def read_users(folder: Path) -> list[str]:
    found = [
        pq.read_table(file)["user_id"].to_pylist() for file in sorted(folder.glob("*.parquet"))
    ]
    return [user for part in found for user in part]


def test_rows_are_removed_from_scores_and_from_an_interrupted_run(tmp_path: Path) -> None:
    scores = make_scores(tmp_path)
    partial = tmp_path / "data/.scores/0123"
    write_table(partial / "part-0.parquet", pa.table({"user_id": ["ann", "bob"]}))
    os.utime(scores / "_scores.json", (1, 1))
    assert erase_exported([scores], "ann") == 2
    assert read_users(scores) == USERS[1:]
    assert read_users(partial) == ["bob"]
    assert (scores / "_scores.json").stat().st_mtime > 1, "the pages show what was erased"
    assert erase_exported([scores], "ann") == 0


@pytest.mark.parametrize("user", USERS)
def test_lines_are_removed_from_csv_files(tmp_path: Path, user: str) -> None:
    file = tmp_path / "people.csv"
    write_csv(make_scores(tmp_path), file)
    assert erase_exported([file, tmp_path / "absent.csv", tmp_path / "absent"], user) == 1
    with file.open(newline="", encoding="utf-8") as lines:
        left = [row["user_id"].removeprefix("'") for row in csv.DictReader(lines)]
    assert left == [other for other in USERS if other != user]


def test_what_a_link_names_is_erased_from_and_stays_private(tmp_path: Path) -> None:
    scores = make_scores(tmp_path)
    file, link = tmp_path / "people.csv", tmp_path / "latest.csv"
    write_csv(scores, file)
    link.symlink_to(file)
    private = [file, *scores.glob("*.parquet")]
    for path in private:
        path.chmod(0o600)
    assert erase_exported([link, scores], "ann") == 2
    assert link.is_symlink()
    assert "ann" not in file.read_text()
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_what_is_left_of_a_csv_file_is_as_it_was(tmp_path: Path) -> None:
    """Whatever its name, and with the quotes that keep a spreadsheet from reading formulas."""
    file = tmp_path / "PEOPLE.CSV"
    write_csv(make_scores(tmp_path), file)
    before = file.read_text().splitlines(keepends=True)
    assert erase_exported([file], "ann") == 1
    assert file.read_text() == "".join(line for line in before if "ann" not in line)


def test_what_is_no_csv_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "people.parquet"
    file.write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(UserError, match="people"):
        erase_exported([file], "ann")


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_file_that_a_spreadsheet_saved_is_read(tmp_path: Path, quote: str) -> None:
    file = tmp_path / "people.csv"
    head = f"\ufeff{quote}user_id{quote},purchase_14d\r\n"
    file.write_bytes(f"{head}ann,0.25\r\nbob,0.5\r\n".encode())
    assert erase_exported([file], "ann") == 1
    assert file.read_bytes() == f"{head}bob,0.5\r\n".encode()


def test_a_file_without_ids_is_told_and_the_others_are_changed(tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_text("user_id;purchase_14d\nann;0.25\n")
    other = tmp_path / "other.csv"
    other.write_text("user_id,purchase_14d\nann,0.25\n")
    with pytest.raises(UserError, match=r"^people.csv: no column user_id"):
        erase_exported([file, other], "ann")
    assert other.read_text() == "user_id,purchase_14d\n"
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert erase_exported([empty], "ann") == 0


def test_many_are_erased_at_once(tmp_path: Path) -> None:
    users = [f"user{number}" for number in range(24)]
    table = pa.table({"user_id": users, "purchase_14d": [0.5] * len(users)})
    scores = tmp_path / "data/scores"
    write_table(scores / "part-0.parquet", table)
    write_json(scores / "_scores.json", {})
    file = tmp_path / "people.csv"
    write_csv(scores, file)
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda user: erase_exported([scores, file], user), users[1:]))
    assert counts == [2] * len(users[1:])
    assert read_users(scores) == users[:1]
    assert [row["user_id"] for row in csv.DictReader(file.open())] == users[:1]


def test_nothing_is_changed_under_a_run_that_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_WAIT_SECONDS", 0.1)
    scores = make_scores(tmp_path)
    lock = tmp_path / "data/.scores/lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written"):
            erase_exported([scores], "ann")
    assert read_users(scores) == USERS


def test_exports_are_what_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORECART_EXPORTS", raising=False)
    assert find_exports() == []
    monkeypatch.setenv("FORECART_EXPORTS", os.pathsep.join(["/a/data/scores", "/b.csv"]))
    assert find_exports() == [Path("/a/data/scores"), Path("/b.csv")]


def test_exports_from_the_folder_of_the_server_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORECART_EXPORTS", os.pathsep.join(["/a/data/scores", "data/scores"]))
    with pytest.raises(UserError, match="FORECART_EXPORTS: data/scores: it needs its whole path"):
        find_exports()
