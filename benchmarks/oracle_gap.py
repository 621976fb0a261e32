"""How much of what can be known the models know: gaps to the simulator's exact oracle.

Method: the whole pipeline with the settings of params.yaml on simulated shops of several seeds,
each with a training seed of its own. On the test cut, for ROC-AUC (spend: Gini):

    base to oracle       (model - base) / (oracle - base), base = .5 (spend: 0)
    lightgbm to oracle   (model - lightgbm) / (oracle - lightgbm)
    ahead                the lower end of the paired 95 % interval of model - lightgbm, by shop
    ahead_of_lstm        the same of model - lstm, the baseline that reads the raw events
    ece, total_ratio     beside the oracle's own, which is what chance leaves on one cut
    total_to_oracle      predicted over the oracle's expected total, by shop: its own total_ratio
                         is what the luck of the test windows leaves to nobody
    ece_to_oracle        the ece where the oracle's probabilities stand for what happened, which
                         leaves nothing to chance; the same of LightGBM

    python benchmarks/oracle_gap.py [--seeds 3] [--shop SEED] [--model ensemble] [--shoppers N]
        [--tests 1]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from pipelines.config import parse_params
from pipelines.io import read_json

STAGES: Final = (
    "fingerprint",
    "ingest",
    "validate",
    "features",
    "pretrain",
    "train",
    "baselines",
    "evaluate",
)

_BY_SHOP: Final = {
    "ahead",
    "ahead_of_lstm",
    "total_ratio",
    "total_ratio_of_oracle",
    "total_to_oracle",
    "total_to_oracle_of_lightgbm",
}


def main() -> None:
    """Run the shops and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shop", type=int, help="seed of the first shop; default: params.yaml")
    parser.add_argument("--model", default="ensemble")
    parser.add_argument("--shoppers", type=int, help="registered in a shop; default: params.yaml")
    parser.add_argument("--tests", type=int, help="test cuts; default: params.yaml")
    given = parser.parse_args()
    settings = yaml.safe_load(Path("params.yaml").read_text())
    if given.tests is not None:
        settings["cuts"]["test"] = given.tests
    if given.shoppers is not None:
        settings["ingest"]["simulator"]["users"] = given.shoppers
    shop = settings["ingest"]["simulator"]["seed"] if given.shop is None else given.shop
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(given.seeds):
        settings["ingest"]["simulator"]["seed"] = shop + number
        settings["train"]["seed"] = 1 + number
        began = time.perf_counter()
        for target, entry in run_shop(settings, given.model).items():
            found.setdefault(target, []).append(entry)
        print(f"shop {shop + number}: {time.perf_counter() - began:.0f} s", flush=True)
    print(json.dumps({target: join(entries) for target, entries in found.items()}, indent=2))


def run_stages(settings: dict[str, Any], root: Path) -> dict[str, Any]:
    """Run the stages in an empty folder; return the content of reports/evaluation.json."""
    (root / "expectations").symlink_to(Path("expectations").resolve())
    params = parse_params(settings)
    for stage in STAGES:
        import_module(f"pipelines.stages.{stage}").run(params, root)
    evaluation: dict[str, Any] = read_json(root / "reports/evaluation.json")
    return evaluation


def run_shop(settings: dict[str, Any], model: str) -> dict[str, dict[str, float]]:
    """Run the stages in a folder of their own; return figures by target."""
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        evaluation = run_stages(settings, Path(folder))
    result = {}
    for target, entry in evaluation["targets"].items():
        metric, base = ("roc_auc", 0.5) if entry["kind"] == "binary" else ("gini", 0.0)
        value = {name: m[metric]["value"] for name, m in entry["models"].items()}
        error = "ece" if entry["kind"] == "binary" else "total_ratio"
        result[target] = {
            model: value[model],
            "lightgbm": value["lightgbm"],
            "lstm": value["lstm"],
            "oracle": value["oracle"],
            "base_to_oracle": (value[model] - base) / (value["oracle"] - base),
            "lightgbm_to_oracle": (value[model] - value["lightgbm"])
            / (value["oracle"] - value["lightgbm"]),
            "ahead": entry["paired"][f"{model}-lightgbm"][metric]["low"],
            "ahead_of_lstm": entry["paired"][f"{model}-lstm"][metric]["low"],
            error: entry["models"][model][error]["value"],
            f"{error}_of_oracle": entry["models"]["oracle"][error]["value"],
        }
        if entry["kind"] == "binary":
            result[target] |= {
                "ece_to_oracle": entry["models"][model]["ece_to_oracle"],
                "ece_to_oracle_of_lightgbm": entry["models"]["lightgbm"]["ece_to_oracle"],
            }
        else:
            told = {name: entry["models"][name][error]["value"] for name in (model, "lightgbm")}
            expected = entry["models"]["oracle"][error]["value"]
            result[target] |= {
                "total_to_oracle": told[model] / expected,
                "total_to_oracle_of_lightgbm": told["lightgbm"] / expected,
            }
    return result


def join(entries: list[dict[str, float]]) -> dict[str, Any]:
    """Mean over shops; lower bounds and totals of every shop."""
    joined: dict[str, Any] = {
        name: round(float(np.mean([e[name] for e in entries])), 4) for name in entries[0]
    }
    for name in _BY_SHOP & joined.keys():
        joined[name] = [round(e[name], 4) for e in entries]
    return joined


if __name__ == "__main__":
    main()
