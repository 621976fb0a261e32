"""The pipeline on public event logs: the behaviour model beside LightGBM, with paired intervals.

Method: each set goes through the stages as `dvc repro` would run them, with the settings of
params.yaml but for what the length of the log asks for (horizons and cuts below). Judged is the
test cut, once; with --tests several, a training step apart, all after what either model learnt
from. Told for every target: ROC-AUC, PR-AUC, Brier score and ECE, or MAE and Gini of spend, of both
models, and the paired difference with its 95 % interval (bootstrap over users). With --seeds both
are trained so many times, each time from another seed; told are means over the seeds, with the
interval of their mean difference (one bootstrap for all), and each seed's difference.

Sets (files of these names in --folder; none is part of this project):

    online_retail      UCI Online Retail II: purchases of a British wholesaler, 2009 to 2011
    completejourney    dunnhumby The Complete Journey: baskets of households, a year, with tables
                       of products and households
    taobao             Alibaba user behaviour: views, carts, wishes, purchases, nine days
    rees46             REES46 multi-category shop: the head of a month
    trivago            trivago RecSys 2019 sessions: searches, views and click-outs, a week

    python benchmarks/real_data.py --folder DIR [--only online_retail taobao] [--tests 4]
        [--seeds 1] [--members 1] [--no-tables]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.evaluation.comparison import collect_test_rows
from pipelines.evaluation.metrics import Floats, amount_metrics, binary_metrics, draw_weights
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.stages.train import FEATURES

ONCE: Final = ("fingerprint", "ingest", "validate", "features")
OF_A_SEED: Final = ("pretrain", "train", "baselines")
PAIR: Final = ("ensemble", "lightgbm")
PREDICTIONS: Final = Path("data/predictions")
TOLD: Final = ("roc_auc", "pr_auc", "brier", "ece", "mae", "gini")
SHORT: Final = {
    "targets": {"horizons_days": [1, 2], "primary_horizon_days": 1},
    "population": {"active_within_days": 3},
    "cuts": {"train": 2, "step_days": 1, "min_history_days": 2},
    "features": {"windows_days": [1, 2, 3, 7]},
}
SETS: Final[dict[str, dict[str, Any]]] = {
    "online_retail": {
        "file": "online_retail.parquet",
        "mapping": {
            "user_id": "CustomerID",
            "ts": {"column": "InvoiceDate", "timezone": "Europe/London"},
            "event_type": {"value": "purchase"},
            "item_id": "StockCode",
            "price": "UnitPrice",
            "quantity": "Quantity",
            "session_id": "InvoiceNo",
        },
        "params": {},
    },
    "completejourney": {
        "file": "completejourney_transactions.csv.gz",
        "mapping": {
            "user_id": "household_id",
            "ts": "transaction_timestamp",
            "event_type": {"value": "purchase"},
            "item_id": "product_id",
            "price": "sales_value",
            "quantity": None,
            "session_id": "basket_id",
        },
        "tables": {
            "items": (
                "completejourney_products.csv.gz",
                {"product_id": "item_id", "product_category": "category", "brand": "brand"},
            ),
            # Income stands in the one free column of groups that a shopper has.
            "users": (
                "completejourney_demographics.csv.gz",
                {"household_id": "user_id", "age": "age", "income": "region"},
            ),
        },
        "params": {},
    },
    "taobao": {
        "file": "taobao_behavior.csv.gz",
        "mapping": {
            "ts": {"column": "ts", "unit": "s"},
            "event_type": {
                "column": "behavior",
                "values": {
                    "pv": "view",
                    "cart": "add_to_cart",
                    "fav": "wishlist",
                    "buy": "purchase",
                },
            },
            "category": "category_id",
        },
        "params": SHORT,
    },
    "rees46": {
        "file": "rees46_head.csv.gz",
        "mapping": {
            "ts": "event_time",
            "event_type": {
                "column": "event_type",
                "values": {"view": "view", "cart": "add_to_cart", "purchase": "purchase"},
            },
            "item_id": "product_id",
            "category": "category_code",
            "session_id": "user_session",
        },
        "params": SHORT,
    },
    "trivago": {
        "file": "trivago_sessions.parquet",
        "keep_repeats": True,
        "mapping": {
            "ts": {"column": "timestamp", "unit": "s"},
            "event_type": {
                "column": "action_type",
                "values": {
                    "search for destination": "search",
                    "search for poi": "search",
                    "search for item": "search",
                    "interaction item image": "view",
                    "interaction item info": "view",
                    "interaction item deals": "view",
                    "interaction item rating": "view",
                    "clickout item": "add_to_cart",
                    "filter selection": None,
                    "change of sort order": None,
                },
            },
            "item_id": {"column": "reference", "only": ["view", "add_to_cart"]},
            "query": {"column": "reference", "only": ["search"]},
        },
        "params": {
            **SHORT,
            "targets": {**SHORT["targets"], "events": ["add_to_cart", "search"]},
        },
    },
}


def main() -> None:
    """Run the sets and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(SETS))
    parser.add_argument("--tests", type=int, default=1, help="test cuts")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of either model")
    parser.add_argument("--members", type=int, help="networks that answer together")
    parser.add_argument("--no-tables", action="store_true", help="of items and shoppers")
    given = parser.parse_args()
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["cuts"]["test"] = given.tests
    if given.members is not None:
        settings["train"]["members"] = given.members
    expectations = Path("expectations").resolve()
    for name in given.only or SETS:
        with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
            root = Path(folder)
            (root / "expectations").symlink_to(expectations)
            tables = {} if given.no_tables else write_tables(name, given.folder, root)
            found = measure(name, settings, given.folder, root, tables, given.seeds)
            print(json.dumps({name: found}), flush=True)


def write_tables(name: str, folder: Path, root: Path) -> dict[str, str]:
    """Write a set's tables of items and shoppers with the columns that ingest knows.

    Ages come in bands, such as 45-54 or 65+, and become the lower end plus five.

    Returns:
        The files by the name of their setting.
    """
    written = {}
    for kind, (file, columns) in SETS[name].get("tables", {}).items():
        table = pd.read_csv(folder / file, dtype="string", usecols=list(columns))
        table = table.rename(columns=columns)
        if "age" in table:
            table["age"] = table["age"].str[:2].astype("float64") + 5
        table.to_parquet(root / f"{kind}.parquet")
        written[kind] = str(root / f"{kind}.parquet")
    return written


def measure(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    root: Path,
    tables: dict[str, str],
    seeds: int,
) -> dict[str, Any]:
    """Run the stages on one set and compare the two models."""
    entry = SETS[name]
    files = {
        **settings["ingest"]["files"],
        "path": str((folder / entry["file"]).resolve()),
        "mapping": entry["mapping"],
        "keep_repeats": entry.get("keep_repeats", False),
        **tables,
    }
    merged = dict(settings)
    merged["ingest"] = {**settings["ingest"], "source": "files", "files": files}
    # Nobody asks for it here.
    lstm = {**settings["baselines"]["lstm"], "epochs": 0}
    merged["baselines"] = {**settings["baselines"], "lstm": lstm}
    for section, changes in entry["params"].items():
        merged[section] = {**settings[section], **changes}
    began = time.perf_counter()
    try:
        _run(ONCE, merged, root)
        scored = []
        for seed in range(1, seeds + 1):
            for section in ("train", "baselines"):
                merged[section] = {**merged[section], "seed": seed}
            _run(OF_A_SEED, merged, root)
            scored.append(score(root, merged))
    except UserError as error:
        return {"stopped": str(error)}
    table = SnapshotTable.load(root / FEATURES)
    offsets = np.load(root / FEATURES / "sequences/offsets.npy", allow_pickle=False)
    return {
        "events": int(offsets[-1]),
        "shoppers": len(np.unique(table.user[table.rows_of(Split.TEST)])),
        "seconds": round(time.perf_counter() - began),
        **{target: join([found[target] for found in scored]) for target in scored[0]},
    }


def _run(stages: Sequence[str], settings: dict[str, Any], root: Path) -> None:
    for stage in stages:
        import_module(f"pipelines.stages.{stage}").run(parse_params(settings), root)


def score(root: Path, settings: dict[str, Any]) -> dict[str, dict[str, Floats]]:
    """Score both models on the test rows.

    Returns:
        Target -> metric -> (2, B) of the ensemble and LightGBM: the value, then its samples.
    """
    table = SnapshotTable.load(root / FEATURES)
    config = parse_params(settings).evaluation
    files = (PREDICTIONS / "ensemble.parquet", PREDICTIONS / "baselines/lightgbm.parquet")
    read = {name: pq.read_table(root / file) for name, file in zip(PAIR, files, strict=True)}
    rows = table.rows_of(Split.TEST)
    weights = draw_weights(table.user[rows], samples=config.bootstrap_samples, seed=config.seed)
    predictions = {
        name: {t.name: found[t.name].to_numpy().astype(np.float64) for t in table.targets}
        for name, found in read.items()
    }
    scored = {}
    for part in collect_test_rows(table, predictions, config):
        models = [
            binary_metrics(part.y, p, weights, threshold=part.thresholds[name])
            if part.target.kind is Kind.BINARY
            else amount_metrics(part.y, p, weights)
            for name, p in part.predictions.items()
        ]
        scored[part.target.name] = {
            metric: np.array([model[metric] for model in models])
            for metric in TOLD
            if metric in models[0]
        }
    return scored


def join(seeds: list[dict[str, Floats]]) -> dict[str, Any]:
    """Means over seeds of both models, their difference, its bounds, and it by seed."""
    joined: dict[str, Any] = {}
    for metric in seeds[0]:
        values = np.array([found[metric] for found in seeds])
        if not np.isfinite(values[:, :, 0]).all():
            continue
        by_seed = values[:, 0] - values[:, 1]
        means = values[:, :, 0].mean(axis=0)
        difference = by_seed.mean(axis=0)
        bounds = np.nanquantile(difference[1:], [0.025, 0.975])
        joined[metric] = np.round([*means, difference[0], *bounds], 4).tolist()
        if len(seeds) > 1:
            joined[f"{metric}_by_seed"] = np.round(by_seed[:, 0], 4).tolist()
    return joined


if __name__ == "__main__":
    main()
