"""The pipeline on public event logs: the behaviour model beside LightGBM, with paired intervals.

Method: each set goes through the stages as `dvc repro` would run them, with the settings of
params.yaml but for what the length of the log asks for (horizons and cuts below). Judged is the
test cut, once; with --tests several, a training step apart, all after what either model learnt
from. Told for every target: ROC-AUC, PR-AUC, Brier score and ECE, or MAE and Gini of spend, of both
models, and the paired difference with its 95 % interval (bootstrap over users). With --seeds both
are trained so many times, each time from another seed; with --origins as if the log had ended
earlier as well, so many times, eight weeks apart, or more where horizons are longer, so that no two
have a window in common (rolling origin; Tashman, International Journal of Forecasting 16, 2000).
The same is told of the model and BG/NBD with Gamma-Gamma, and with --lstm of it and the LSTM.
Told are then means over all of these fits, the interval of their mean difference (one bootstrap
over users for all), and each fit's difference; an origin for which the log is too short ends the
list, and says so. With --horizons and --everyone other questions are asked: of so many days, and of
everyone seen so far instead of the shoppers of late.

Sets (files of these names in --folder; none is part of this project):

    online_retail      UCI Online Retail II: purchases of a British wholesaler, 2009 to 2011
    completejourney    dunnhumby The Complete Journey: baskets of households, a year, with tables
                       of products and households
    taobao             Alibaba user behaviour: views, carts, wishes, purchases, nine days
    rees46             REES46 multi-category shop: the head of a month
    trivago            trivago RecSys 2019 sessions: searches, views and click-outs, a week

    python benchmarks/real_data.py --folder DIR [--only online_retail taobao] [--tests 4]
        [--seeds 1] [--origins 1] [--horizons 7 14 28] [--everyone] [--members 1]
        [--tables users items] [--lstm]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.evaluation.comparison import TestRows, collect_test_rows
from pipelines.evaluation.metrics import Floats, amount_metrics, binary_metrics, draw_weights
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.io import read_json
from pipelines.stages.train import FEATURES

ONCE: Final = ("fingerprint", "ingest", "validate", "features")
OF_A_SEED: Final = ("pretrain", "train", "baselines")
RIVALS: Final = ("lightgbm", "bgnbd", "lstm")
PREDICTIONS: Final = Path("data/predictions")
EVERY_DAYS: Final = 56
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
    parser.add_argument("--origins", type=int, default=1, help="days that the log is read until")
    parser.add_argument("--horizons", type=int, nargs="*", help="of the targets, in days")
    parser.add_argument("--everyone", action="store_true", help="not only the shoppers of late")
    parser.add_argument("--members", type=int, help="networks that answer together")
    parser.add_argument(
        "--tables", nargs="*", choices=("users", "items"), default=["users"], help="beside events"
    )
    parser.add_argument("--lstm", action="store_true", help="compare with the LSTM, too")
    given = parser.parse_args()
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["cuts"]["test"] = given.tests
    if not given.lstm:
        settings["baselines"]["lstm"]["epochs"] = 0
    if given.members is not None:
        settings["train"]["members"] = given.members
    changes: dict[str, Any] = {}
    if given.horizons:
        days = sorted(given.horizons)
        primary = days[(len(days) - 1) // 2]
        changes["targets"] = {"horizons_days": days, "primary_horizon_days": primary}
    if given.everyone:
        changes["population"] = {"active_within_days": None}
    expectations = Path("expectations").resolve()
    for name in given.only or SETS:
        with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
            root = Path(folder)
            (root / "expectations").symlink_to(expectations)
            tables = write_tables(name, given.tables, given.folder, root)
            asked = merge(name, settings, changes, given.folder, tables)
            found = measure(asked, root, seeds=given.seeds, origins=given.origins)
            print(json.dumps({name: found}), flush=True)


def write_tables(name: str, kinds: Sequence[str], folder: Path, root: Path) -> dict[str, str]:
    """Write a set's tables of these kinds with the columns that ingest knows.

    Ages come in bands, such as 45-54 or 65+, and become the lower end plus five.

    Returns:
        The files by the name of their setting.
    """
    written = {}
    for kind, (file, columns) in SETS[name].get("tables", {}).items():
        if kind not in kinds:
            continue
        table = pd.read_csv(folder / file, dtype="string", usecols=list(columns))
        table = table.rename(columns=columns)
        if "age" in table:
            table["age"] = table["age"].str[:2].astype("float64") + 5
        table.to_parquet(root / f"{kind}.parquet")
        written[kind] = str(root / f"{kind}.parquet")
    return written


def merge(
    name: str,
    settings: dict[str, Any],
    changes: dict[str, Any],
    folder: Path,
    tables: dict[str, str],
) -> dict[str, Any]:
    """Return the settings with what a set asks for, and then with the changes, by section."""
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
    for section, changed in (*entry["params"].items(), *changes.items()):
        merged[section] = {**merged[section], **changed}
    return merged


def measure(asked: dict[str, Any], root: Path, *, seeds: int, origins: int) -> dict[str, Any]:
    """Run the stages with these settings and compare the two models."""
    merged = dict(asked)
    apart = (merged["cuts"]["test"] - 1) * merged["cuts"]["step_days"]
    every = max(EVERY_DAYS, max(merged["targets"]["horizons_days"]) + apart)
    began = time.perf_counter()
    fits: list[Fit] = []
    events, end = 0, None
    stopped: dict[str, Any] = {}
    try:
        for origin in range(origins):
            if end is not None:
                until = f"{end - timedelta(days=every * origin):%Y-%m-%d}"
                merged["ingest"] = {**merged["ingest"], "until": until}
            _run(ONCE, merged, root)
            if end is None:
                end = datetime.fromisoformat(read_json(root / FEATURES / "cuts.json")["end_ts"])
                events = int(np.load(root / FEATURES / "sequences/offsets.npy")[-1])
            for seed in range(1, seeds + 1):
                for section in ("train", "baselines"):
                    merged[section] = {**merged[section], "seed": seed}
                _run(OF_A_SEED, merged, root)
                fits.append(read_fit(root, merged))
    except UserError as error:
        # The log may be too short for the earliest origins; those before are told.
        stopped["stopped"] = str(error)
    if not fits:
        return stopped
    names, code = np.unique(np.concatenate([fit.user for fit in fits]), return_inverse=True)
    config = parse_params(merged).evaluation
    weights = draw_weights(
        code.astype(np.int32), samples=config.bootstrap_samples, seed=config.seed
    )
    parts = np.split(weights, np.cumsum([len(fit.user) for fit in fits])[:-1], axis=1)
    scored = [score(fit, part) for fit, part in zip(fits, parts, strict=True)]
    return {
        "events": events,
        "shoppers": len(names),
        "rows": [len(fit.user) for fit in fits],
        "seconds": round(time.perf_counter() - began),
        **stopped,
        **join_targets(scored, RIVALS[0]),
        **{rival: found for rival in RIVALS[1:] if (found := join_targets(scored, rival))},
    }


def _run(stages: Sequence[str], settings: dict[str, Any], root: Path) -> None:
    for stage in stages:
        import_module(f"pipelines.stages.{stage}").run(parse_params(settings), root)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the models say of the test rows.

    Attributes:
        user: (N,) ids.
        rows: outcomes and predictions by target.
    """

    user: NDArray[np.str_]
    rows: list[TestRows]


def read_fit(root: Path, settings: dict[str, Any]) -> Fit:
    """Read what the stages wrote."""
    table = SnapshotTable.load(root / FEATURES)
    files = {"ensemble": PREDICTIONS / "ensemble.parquet"} | {
        name: PREDICTIONS / f"baselines/{name}.parquet" for name in RIVALS
    }
    read = {n: pq.read_table(root / file) for n, file in files.items() if (root / file).exists()}
    predictions = {
        name: {
            t.name: found[t.name].to_numpy().astype(np.float64)
            for t in table.targets
            if t.name in found.column_names
        }
        for name, found in read.items()
    }
    ids = pq.read_table(root / FEATURES / "users.parquet")["user_id"]
    user = table.user[table.rows_of(Split.TEST)]
    return Fit(
        user=np.array(ids.take(pa.array(user)).to_pylist(), dtype=np.str_),
        rows=collect_test_rows(table, predictions, parse_params(settings).evaluation),
    )


def score(fit: Fit, weights: Floats) -> dict[str, dict[str, dict[str, Floats]]]:
    """Score the models.

    Args:
        fit: of N rows.
        weights: (B, N), the first all ones.

    Returns:
        Target -> model -> metric -> (B,).
    """
    scored = {}
    for part in fit.rows:
        models = {
            name: binary_metrics(part.y, p, weights, threshold=part.thresholds[name])
            if part.target.kind is Kind.BINARY
            else amount_metrics(part.y, p, weights)
            for name, p in part.predictions.items()
        }
        scored[part.target.name] = {
            name: {metric: found[metric] for metric in TOLD if metric in found}
            for name, found in models.items()
        }
    return scored


def join_targets(
    scored: list[dict[str, dict[str, dict[str, Floats]]]], rival: str
) -> dict[str, Any]:
    """Join every target's fits, of those that the rival predicts."""
    return {
        target: join([(found[target]["ensemble"], found[target][rival]) for found in scored])
        for target, models in scored[0].items()
        if rival in models
    }


def join(fits: list[tuple[dict[str, Floats], dict[str, Floats]]]) -> dict[str, Any]:
    """Means over fits of the ensemble and a rival, their difference, its bounds, and it by fit."""
    joined: dict[str, Any] = {}
    for metric in fits[0][0]:
        values = np.array([[model[metric] for model in pair] for pair in fits])
        if not np.isfinite(values[:, :, 0]).all():
            continue
        by_fit = values[:, 0] - values[:, 1]
        means = values[:, :, 0].mean(axis=0)
        difference = by_fit.mean(axis=0)
        bounds = np.nanquantile(difference[1:], [0.025, 0.975])
        joined[metric] = np.round([*means, difference[0], *bounds], 4).tolist()
        if len(fits) > 1:
            joined[f"{metric}_by_fit"] = np.round(by_fit[:, 0], 4).tolist()
    return joined


if __name__ == "__main__":
    main()
