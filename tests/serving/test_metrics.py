"""What Prometheus is told where a process of the service was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SERVE = """
import os, sys
from serving.metrics import Metrics, describe, forget_dead
forget_dead()
metrics = Metrics()
metrics.show_model(sys.argv[1])
metrics.count_swap(taken=True)
print(describe()[0].decode(), flush=True)
os.kill(os.getpid(), 9)
"""


def serve(folder: Path, digest: str) -> str:
    """Run a process that serves a model and is killed; return what it tells."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", SERVE, digest]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_a_process_that_was_killed_serves_no_model_and_keeps_its_counts(tmp_path: Path) -> None:
    assert 'forecart_model_info{digest="old"} 1.0' in serve(tmp_path, "old")
    told = serve(tmp_path, "new")
    assert 'forecart_model_info{digest="new"} 1.0' in told
    assert "old" not in told
    assert 'forecart_model_swaps_total{outcome="taken"} 2.0' in told
