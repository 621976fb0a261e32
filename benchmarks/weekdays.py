"""Windows that are not whole weeks: does a model know what a weekday does?

Method: the pipeline on a simulated shop with horizons of one, three and ten days and seven test
cuts a day apart, one for every weekday, all after what the models learnt from. The oracle's
probabilities stand for what happens, so that chance leaves nothing. By target, means over the cuts:

    ece        calibration error to the oracle's probabilities
    level      mean probability less the oracle's, cut by cut
    log_loss, roc_auc

    python -m benchmarks.weekdays [--shop SEED]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.oracle_gap import run_stages
from pipelines.evaluation.metrics import calibration_error
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import SnapshotTable

HORIZONS: Final = (1, 3, 10)
PREDICTIONS: Final = Path("data/predictions")
MODELS: Final = ("ensemble", "gpt", "baselines/lightgbm")
ORACLE: Final = "baselines/oracle"

Doubles = NDArray[np.float64]


def main() -> None:
    """Run a shop and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shop", type=int, help="its seed; default: params.yaml")
    given = parser.parse_args()
    settings: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    if given.shop is not None:
        settings["ingest"]["simulator"]["seed"] = given.shop
    settings["targets"] |= {"horizons_days": list(HORIZONS), "primary_horizon_days": HORIZONS[1]}
    settings["cuts"] |= {"test": 7, "step_days": 1}
    settings["baselines"]["lstm"]["epochs"] = 0
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        root = Path(folder)
        run_stages(settings, root)
        print(json.dumps(measure(root), indent=2))


def measure(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the figures of every target and model."""
    table = SnapshotTable.load(root / "data/features")
    test = table.rows_of(Split.TEST)
    chosen = test[table.rows_of(Split.CALIBRATION, Split.TEST)]
    read = {
        name: pq.read_table(root / PREDICTIONS / f"{name}.parquet") for name in (*MODELS, ORACLE)
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for target in table.targets:
        if target.kind is not Kind.BINARY:
            continue
        said = {
            name: columns[target.name].to_numpy().astype(np.float64)[chosen]
            for name, columns in read.items()
        }
        y = table.labels[target.name][test]
        cuts = [table.cut[test] == cut for cut in np.unique(table.cut[test])]
        found[target.name] = {
            Path(name).name: score([(said[name][at], said[ORACLE][at], y[at]) for at in cuts])
            for name in MODELS
        }
    return found


def score(cuts: list[tuple[Doubles, Doubles, Doubles]]) -> dict[str, Any]:
    """Score a model on what it and the oracle say, and what happened, cut by cut."""

    def error(p: Doubles, truth: Doubles) -> float:
        return float(calibration_error(truth, p, np.ones((1, len(p))))[0])

    return {
        "ece": round(float(np.mean([error(p, truth) for p, truth, _ in cuts])), 4),
        "level": [round(float(np.mean(p - truth)), 4) for p, truth, _ in cuts],
        "log_loss": round(float(np.mean([log_loss(y, p, labels=[0, 1]) for p, _, y in cuts])), 4),
        "roc_auc": round(float(np.mean([roc_auc_score(y, p) for p, _, y in cuts])), 4),
    }


if __name__ == "__main__":
    main()
