"""The pipeline on public event logs: the behaviour model beside LightGBM, with paired intervals.

Method: each set goes through the stages as `dvc repro` would run them, with the settings of
params.yaml but for what the length of the log asks for (horizons and cuts below). Judged is the
test cut, once; with --tests several, a training step apart, all after what either model learnt
from. Told for every target: ROC-AUC, PR-AUC, Brier score and ECE, or MAE and Gini of spend, of both
models, and the paired difference with its 95 % interval (bootstrap over users).

Sets (files of these names in --folder; none is part of this project):

    online_retail      UCI Online Retail II: purchases of a British wholesaler, 2009 to 2011
    completejourney    dunnhumby The Complete Journey: baskets of households, a year, with tables
                       of products and households
    taobao             Alibaba user behaviour: views, carts, wishes, purchases, nine days
    rees46             REES46 multi-category shop: the head of a month
    trivago            trivago RecSys 2019 sessions: searches, views and click-outs, a week

    python benchmarks/real_data.py --folder DIR [--only online_retail taobao] [--tests 4]
        [--members 1] [--no-tables]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from pipelines.config import parse_params
from pipelines.errors import UserError
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
            found = measure(name, settings, given.folder, root, tables)
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
    name: str, settings: dict[str, Any], folder: Path, root: Path, tables: dict[str, str]
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
    for section, changes in entry["params"].items():
        merged[section] = {**settings[section], **changes}
    params = parse_params(merged)
    began = time.perf_counter()
    try:
        for stage in STAGES:
            import_module(f"pipelines.stages.{stage}").run(params, root)
    except UserError as error:
        return {"stopped": str(error)}
    evaluation = read_json(root / "reports/evaluation.json")
    result: dict[str, Any] = {
        "events": evaluation["data"]["events"],
        "seconds": round(time.perf_counter() - began),
    }
    for target, found in evaluation["targets"].items():
        paired = found["paired"]["ensemble-lightgbm"]
        result[target] = {
            "users": found["users"],
            **{
                metric: [
                    round(found["models"]["ensemble"][metric]["value"], 4),
                    round(found["models"]["lightgbm"][metric]["value"], 4),
                    *(round(paired[metric][bound], 4) for bound in ("diff", "low", "high")),
                ]
                for metric in ("roc_auc", "pr_auc", "brier", "ece", "mae", "gini")
                if metric in paired and found["models"]["ensemble"][metric]["value"] is not None
            },
        }
    return result


if __name__ == "__main__":
    main()
