"""What each part of the behaviour model is worth: the same training without it.

Method: on the features of a finished run (`make run`), every variant is pretrained, fitted,
calibrated and refitted with the settings of params.yaml but for the part named, and predicts the
test cut. Told are ROC-AUC of purchase and search at the primary horizon and the Gini of spend,
each with the paired difference to the full model of the same seed: mean over seeds, and the 95 %
interval of a bootstrap over users that is shared by all variants and seeds.

    python benchmarks/ablations.py [--root .] [--seeds 3] [--only lstm cnn]

    full              the network as shipped, without the trees beside it
    with trees        the whole model as shipped
    no pretraining    random weights at the start of the fit
    no next event     nor is the next event told beside the labels
    no NOW token      what lies between the last event and the cut is hidden from the model: its
                      readout token has the time of the last event and no numbers
    no time encoding  gaps, calendar and times of events are hidden; their order stays
    no fusion         no snapshot features beside the history
    2, 3 members      so many networks of other seeds answer together
    lstm, cnn, bert, mlp   another backbone behind the same tokens and heads
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.config import EnsembleTrees, Params, load_params
from pipelines.evaluation.metrics import amount_metrics, draw_weights, rank_rows, roc_auc
from pipelines.features.cuts import Split
from pipelines.features.snapshot_table import SnapshotTable
from pipelines.io import read_json
from pipelines.model import batches, steps
from pipelines.model.batches import Collated
from pipelines.model.network import CALENDAR, GAP_BINS
from pipelines.model.timeline import Timeline
from pipelines.model.training import pretrain_model, train_model
from pipelines.stages.train import FEATURES, load_inputs

Hide = Callable[[Collated], Collated]
SAMPLES: Final = 500

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "full": {},
    "with trees": {"trees": EnsembleTrees()},
    "no pretraining": {"pretrain": 0},
    "no next event": {"pretrain": 0, "next_event_weight": 0.0},
    "no NOW token": {},
    "no time encoding": {},
    "no fusion": {"fusion": False},
    "2 members": {"members": 2},
    "3 members": {"members": 3},
    "lstm": {"backbone": "lstm"},
    "cnn": {"backbone": "cnn"},
    "bert": {"backbone": "bert"},
    "mlp": {"backbone": "mlp"},
}


def hide_now(collated: Collated) -> Collated:
    """Blank the NOW tokens and move them to the token before."""
    batch = collated.batch
    time_, position = batch.time.flatten().clone(), batch.position.flatten().clone()
    now = torch.sort(batch.now_place).values
    for place in now.tolist():  # a NOW may follow another one
        time_[place], position[place] = time_[place - 1], position[place - 1]
    shape = batch.time.shape
    return replace(
        collated,
        batch=replace(
            batch,
            time=time_.view(shape),
            position=position.view(shape),
            now_numbers=torch.zeros_like(batch.now_numbers),
        ),
    )


def hide_time(collated: Collated) -> Collated:
    """Blank gaps, calendar and times of all tokens."""
    batch = collated.batch
    events, nows = batch.event_numbers.clone(), batch.now_numbers.clone()
    events[:, : GAP_BINS + CALENDAR] = 0.0
    nows[:] = 0.0
    return replace(
        collated,
        batch=replace(
            batch, time=torch.zeros_like(batch.time), event_numbers=events, now_numbers=nows
        ),
    )


HIDDEN: Final[dict[str, Hide]] = {"no NOW token": hide_now, "no time encoding": hide_time}


@contextmanager
def hidden(change: Hide | None) -> Iterator[None]:
    """Change every batch, in training and prediction."""
    if change is None:
        yield
        return

    def collate(*given: Any, **named: Any) -> list[Collated]:
        return [change(part) for part in batches_of(*given, **named)]

    batches_of = batches.collate
    with patch.object(batches, "collate", collate), patch.object(steps, "collate", collate):
        yield


def predict_test(
    params: Params, root: Path, variant: str, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Train a variant and predict the test cuts."""
    changes = dict(VARIANTS[variant])
    pretrain = params.pretrain.model_copy(
        update={"epochs": changes.pop("pretrain", params.pretrain.epochs)}
    )
    none = params.train.trees.model_copy(update={"rounds": 0})
    config = params.train.model_copy(update={"seed": seed, "trees": none, **changes})
    sequences, periods, targets, vocabulary = load_inputs(root)
    with hidden(HIDDEN.get(variant)):
        weights = pretrain_model(sequences, periods, targets, config, pretrain, vocabulary)
        trained = train_model(sequences, periods, targets, config, vocabulary, pretrained=weights)
        table = SnapshotTable.load(root / FEATURES)
        rows = table.rows_of(Split.TEST)
        times = {c["index"]: c["ts_us"] for c in read_json(root / FEATURES / "cuts.json")["cuts"]}
        now = np.array([times[int(c)] for c in table.cut[rows]], dtype=np.int64)
        user = table.user[rows].astype(np.int64)
        return trained.shipped.predict_cuts(Timeline(sequences), user, now)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    given = parser.parse_args()
    params = load_params(given.root / "params.yaml")
    horizon = params.targets.primary_horizon_days
    table = SnapshotTable.load(given.root / FEATURES)
    rows = table.rows_of(Split.TEST)
    names = [t.name for t in table.targets if t.horizon_days == horizon and "churn" not in t.name]
    weights = draw_weights(table.user[rows], samples=SAMPLES, seed=0)
    variants = ["full", *(v for v in (given.only or VARIANTS) if v != "full")]
    result: dict[str, Any] = {}
    for variant in variants:
        began = time.perf_counter()
        scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
        for seed in range(1, given.seeds + 1):
            predicted = predict_test(params, given.root, variant, seed)
            for name in names:
                y = table.labels[name][rows]
                scores[name].append(score(y, predicted[name].astype(np.float64), weights))
        means = {name: np.mean(values, axis=0) for name, values in scores.items()}
        entry: dict[str, Any] = {"seconds_per_seed": (time.perf_counter() - began) / given.seeds}
        for name in names:
            entry[name] = {"value": round(float(means[name][0]), 4)}
            if variant == "full":
                result.setdefault("_full", means)
            else:
                gap = means[name] - result["_full"][name]
                low, high = np.quantile(gap[1:], [0.025, 0.975])
                entry[name] |= {
                    "diff": round(float(gap[0]), 4),
                    "low": round(float(low), 4),
                    "high": round(float(high), 4),
                }
        result[variant] = entry
        print(json.dumps({variant: entry}), flush=True)
    result.pop("_full")
    print(json.dumps(result, indent=2))


def score(
    y: NDArray[np.float64], predicted: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return ROC-AUC of a binary label, Gini of an amount, under each weighting."""
    if set(np.unique(y)) <= {0.0, 1.0}:
        return roc_auc(rank_rows(y, predicted, weights))
    return amount_metrics(y, predicted, weights)["gini"]


if __name__ == "__main__":
    main()
