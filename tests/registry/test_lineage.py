"""The chain of digests of a promoted model: shown, computed again, and broken on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

from pipelines.errors import UserError
from pipelines.io import digest_directory, write_json, write_text
from pipelines.registry import lineage, promotion
from pipelines.registry.champion import fetch_champion, locate_files
from pipelines.registry.connection import connect
from pipelines.registry.tracking import track
from tests.registry.test_promotion import empty_store, judge, root

__all__ = ["empty_store", "root"]  # fixtures


@pytest.fixture
def promoted(root: Path) -> Path:
    """A project with data, a lock file, a trained and promoted model and its Bento."""
    write_text(root / "data/features/schema.json", "{}")
    write_text(root / "dvc.lock", "schema: '2.0'\n")
    folder = root / "models/gpt"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    write_json(folder / "config.json", {"targets": [{"name": "purchase_14d"}]})
    digest = digest_directory(folder)
    data = digest_directory(root / "data/features")
    with track(root, params={}, data_digest=data, name="gpt") as run:
        run.log_model(folder, digest, ["purchase_14d"])
    judge(root, digest)
    promotion.promote(root)
    packed = root / "build/bento/src/model"
    packed.mkdir(parents=True)
    for file in folder.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    write_text(
        root / "build/bento/bento.yaml",
        f"name: forecart\nversion: v1\nlabels: {{model: '{digest}'}}\n",
    )
    return root


def test_the_chain_is_shown_and_holds(promoted: Path) -> None:
    digest = digest_directory(promoted / "models/gpt")
    shown = lineage.show(promoted, None)
    assert digest in shown
    assert digest_directory(promoted / "data/features") in shown
    assert "forecart:v1" in shown
    told = lineage.verify(promoted, "1")
    for name in ("data", "model", "run", "dvc.lock", "verdict", "judged", "passed", "bento"):
        assert f"ok        {name}" in told
    assert lineage.verify(promoted, digest[7:15]) == told


@pytest.mark.parametrize(
    ("name", "path"),
    [("data", "data/features/schema.json"), ("bento", "build/bento/src/model/config.json")],
)
def test_a_changed_file_is_told(promoted: Path, name: str, path: str) -> None:
    write_text(promoted / path, '{"changed": true}')
    with pytest.raises(UserError, match=f"WRONG     {name}"):
        lineage.verify(promoted, None)


def test_a_changed_model_in_the_registry_is_told(promoted: Path) -> None:
    uri = connect(promoted).get_model_version_download_uri("forecart", "1")
    files = locate_files(Path(local_file_uri_to_path(uri)))
    (files / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match="WRONG     model"):
        lineage.verify(promoted, None)


def test_a_verdict_that_was_edited_in_the_registry_is_told(promoted: Path) -> None:
    (kept,) = (promoted / "mlartifacts").rglob("verdict.json")
    kept.write_text('{"passed": true}')
    with pytest.raises(UserError, match="WRONG     verdict") as told:
        lineage.verify(promoted, None)
    assert "WRONG     judged    not as the gate wrote it" in str(told.value)


def test_what_is_not_on_this_machine_does_not_count(promoted: Path) -> None:
    (promoted / "data/features/schema.json").unlink()
    (promoted / "data/features").rmdir()
    assert "not here  data" in lineage.verify(promoted, None)


def test_the_data_of_the_next_model_do_not_count(promoted: Path) -> None:
    write_text(promoted / "data/features/schema.json", '{"changed": true}')
    write_text(promoted / "models/gpt/model.safetensors", "other weights")
    assert "not here  data" in lineage.verify(promoted, None)


def test_an_unknown_model_is_told(promoted: Path, root: Path) -> None:
    for name in ("7", "beef", "²"):
        with pytest.raises(UserError, match="no model has"):
            lineage.verify(promoted, name)


def test_nothing_is_left_in_the_temporary_folder(
    promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    lineage.verify(promoted, None)
    fetch_champion(promoted)
    assert list(temporary.iterdir()) == []
