"""Copies of a model: what they hold, and what is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from serving.copies import Copy, remove_left
from serving.golden import MODEL


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / MODEL
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def age(folder: Path) -> None:
    """Let a folder look an hour old."""
    then = time.time() - 3600
    os.utime(folder, (then, then))


def test_it_stays_as_it_was_taken(place: Path, source: Path) -> None:
    copy = Copy(source)
    (source / "config.json").write_text("[]")
    assert (copy.model / "config.json").read_text() == "{}"
    assert copy.name_source(f"{copy.model}/x: bad") == f"{source}/x: bad"
    copy.remove()
    assert not list(place.iterdir())
    with pytest.raises(UserError, match="no such folder"):
        Copy(source.parent / "none")
    assert not list(place.iterdir())


def test_what_a_killed_process_has_left_goes_with_the_next_copy(place: Path, source: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from serving.copies import Copy; "
        f"copy = Copy(Path({str(source)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = place.iterdir()
    held = Copy(source)
    assert left.exists()  # it might just be being made
    for folder in place.iterdir():
        age(folder)
    strange = place / "forecart-other"
    strange.mkdir()
    age(strange)
    other = Copy(source)
    assert not left.exists()
    assert held.model.exists()
    assert other.model.exists()
    assert strange.exists()
    held.remove()
    other.remove()
    assert list(place.iterdir()) == [strange]


def test_a_folder_that_is_nobodys_to_remove_is_passed_over(place: Path) -> None:
    (place / "forecart-model-file").write_text("")
    age(place / "forecart-model-file")
    remove_left()
    assert (place / "forecart-model-file").exists()
