"""The list of champions that people see, from a real registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.registry.champion import DIGEST_TAG, VERDICT_TAG
from pipelines.registry.connection import connect
from pipelines.registry.history import list_champions
from pipelines.registry.promotion import CHAMPION_ALIAS, HISTORY_TAG

PARAMS = (Path(__file__).resolve().parents[2] / "params.yaml").read_text()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


@pytest.mark.usefixtures("no_address")
def test_where_nothing_is_registered_nothing_is_made(root: Path) -> None:
    assert list_champions(root) == []
    assert not (root / "mlflow.db").exists()


def test_the_newest_comes_first_and_half_made_promotions_do_not_count(root: Path) -> None:
    registry = connect(root)
    registry.create_registered_model("forecart")
    for number in (1, 2, 3):
        tags = {DIGEST_TAG: f"sha256:{number}", VERDICT_TAG: f"sha256:v{number}"}
        registry.create_model_version("forecart", source=f"{root}/{number}", tags=tags)
    assert list_champions(root) == []
    registry.set_registered_model_alias("forecart", CHAMPION_ALIAS, "2")
    # A promoter of version 3 was killed before it moved the alias.
    registry.set_registered_model_tag("forecart", HISTORY_TAG, "[1, 2, 3]")
    found = list_champions(root)
    assert [(r.version, r.present) for r in found] == [(2, True), (1, False)]
    assert (found[0].digest, found[0].verdict) == ("sha256:2", "sha256:v2")
