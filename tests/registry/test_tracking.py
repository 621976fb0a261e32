"""Runs in MLflow whose process is gone."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest

from pipelines.registry.connection import connect
from pipelines.registry.tracking import HOST_TAG, PROCESS_TAG, track
from tests.registry.test_promotion import DATA, empty_store, root

__all__ = ["empty_store", "root"]

GONE = "999999999 1"  # more than a process's number can be
LIVES = None  # as it is tagged


@pytest.mark.parametrize(
    ("settings", "host", "process", "status"),
    [
        ({"epochs": 2}, platform.node(), GONE, "KILLED"),
        # Its number was given again.
        ({"epochs": 2}, platform.node(), f"{os.getpid()} 1", "KILLED"),
        ({"epochs": 2}, platform.node(), LIVES, "RUNNING"),
        ({"epochs": 2}, "another-machine", GONE, "RUNNING"),
        ({"epochs": 3}, platform.node(), GONE, "RUNNING"),
    ],
    ids=["gone", "number given again", "lives", "another machine", "other settings"],
)
def test_a_training_ends_the_run_that_a_killed_one_left(
    root: Path, settings: dict[str, Any], host: str, process: str | None, status: str
) -> None:
    store = connect(root)
    with track(root, params=settings, data_digest=DATA, name="gpt") as left:
        store.set_tag(left.run_id, HOST_TAG, host)
        if process is not None:
            store.set_tag(left.run_id, PROCESS_TAG, process)
        with track(root, params={"epochs": 2}, data_digest=DATA, name="gpt") as run:
            assert store.get_run(left.run_id).info.status == status
        assert store.get_run(run.run_id).info.status == "FINISHED"
    # Whoever was taken for gone, and is not, says so at its end.
    assert store.get_run(left.run_id).info.status == "FINISHED"
