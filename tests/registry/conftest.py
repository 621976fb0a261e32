from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["unset", "empty"])
def no_address(root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which no registry is named; ``root`` is the module's, which unsets it."""
    if request.param == "empty":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
