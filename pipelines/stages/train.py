"""Stage: train the behaviour model, calibrate it, refit it, and predict the held-out cuts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import resource
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

import pipelines.model
from pipelines.config import Backbone, EnsembleTrees, Params, Train
from pipelines.errors import UserError
from pipelines.events import to_us
from pipelines.features.store import Sequences
from pipelines.io import (
    digest_directory,
    read_json,
    replace_directory,
    write_json,
    write_table,
    write_text,
)
from pipelines.model.checkpoint import Checkpoint
from pipelines.model.heads import Target
from pipelines.model.peers import Peers, join_peers
from pipelines.model.predictor import WEIGHTS, Predictor, choose_device
from pipelines.model.runtime import choose_precision, count_workers
from pipelines.model.schedule import Periods, Schedule
from pipelines.model.speed import find_peak
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import (
    TrainedModel,
    assist_training,
    pretrain_model,
    train_model,
)
from pipelines.registry.champion import fetch_champion
from pipelines.registry.tracking import track

FEATURES: Final = Path("data/features")
PRETRAINED: Final = Path("models/pretrained")
MODEL: Final = Path("models/gpt")
CHECKPOINT: Final = "train"
PREDICTIONS: Final = Path("data/predictions/ensemble.parquet")
ALONE: Final = Path("data/predictions/gpt.parquet")
NEXT_ITEMS: Final = Path("data/predictions/gpt_items.parquet")
COMPARED: Final = Path("data/predictions/backbones")
CURVES: Final = Path("reports/training.csv")

# Right after the first event of the data nobody has a history that says much.
_HISTORY_DAYS: Final = 7

_NEXT_ITEMS: Final = 20  # told of every shopper

# Speed differs from run to run, so it is no column of an artefact.
_COLUMNS: Final = ("epoch", "step", "loss", "hazard_loss", "amount_loss", "next_event_loss")


def run(params: Params, root: Path = Path()) -> str:
    """Train; write models/gpt, its predictions and its curves; log all of it to MLflow.

    Of processes that share the steps the first one writes; of the others this returns "".

    Raises:
        UserError: data/features is missing or holds too little to learn from, or the champion that
            the evaluation will compare with cannot be had.
    """
    with join_peers(params.train) as peers:
        return _lead(params, root, peers) if peers.leads else _assist(params, root, peers)


def _assist(params: Params, root: Path, peers: Peers) -> str:
    """Share the steps, and write nothing."""
    peers.meet()  # what ails the data, the leader tells
    sequences, periods, targets, vocabulary = load_inputs(root)
    assist_training(sequences, periods, targets, params.train, vocabulary, peers)
    for backbone in params.train.compare:
        settings = _choose_alone(backbone, params.train)
        inputs = (sequences, periods, targets, settings)
        pretrain_model(*inputs, params.pretrain, vocabulary, peers=peers)
        assist_training(*inputs, vocabulary, peers)
    return ""


def _lead(params: Params, root: Path, peers: Peers) -> str:
    features = root / FEATURES
    sequences, periods, targets, vocabulary = load_inputs(root)
    # Nothing here depends on it, but hours of training would end without it.
    fetch_champion(root)
    checkpoint = open_checkpoint(root, CHECKPOINT, params)
    curves: list[dict[str, float]] = []
    schedule = Schedule.of(params.train, Timeline(sequences), periods.calibration)
    settings = params.train.model_dump() | asdict(schedule) | {"processes": peers.count}
    # Before anything else keeps the cores busy.
    device = choose_device(params.train.device)
    peak = find_peak(device, choose_precision(params.train), params.train.threads)
    if peak is not None:
        peak *= peers.count
    with track(
        root,
        params=settings,
        data_digest=digest_directory(features),
        name=params.train.backbone,
    ) as log:

        def note(epoch: dict[str, float]) -> None:
            curves.append(epoch)
            told = epoch | _utilisation(epoch.get("flops_per_s", 0.0), peak)
            log.log_metrics(told, step=int(epoch["epoch"]))

        pretrained = load_pretrained(root)
        peers.meet()
        trained = train_model(
            sequences,
            periods,
            targets,
            params.train,
            vocabulary,
            note,
            pretrained=pretrained,
            checkpoint=checkpoint,
            threshold=params.evaluation.threshold,
            peers=peers,
        )
        with replace_directory(root / MODEL) as folder:
            trained.save(folder)
        cuts = read_json(features / "cuts.json")
        pairs = {
            PREDICTIONS: (trained.first, trained.shipped),
            ALONE: (trained.network_first, trained.network),
        }
        tables, items = predict(
            list(pairs.values()),
            sequences,
            features,
            cuts,
            next_items=_NEXT_ITEMS,
            workers=count_workers(params.train),
        )
        for path, table in zip([*pairs, NEXT_ITEMS], [*tables, items], strict=True):
            write_table(root / path, table)
        write_text(root / CURVES, format_curves(curves))
        speed = trained.events / max(trained.seconds, 1e-9)
        flops = trained.flops / max(trained.seconds, 1e-9)
        memory = measure_memory(device)
        whole = {"train_events_per_s": speed, "train_flops_per_s": flops}
        whole |= {f"train_{name}": value for name, value in _utilisation(flops, peak).items()}
        log.log_metrics(whole | memory, step=0)
        log.log_artifact(root / CURVES)
        log.log_model(
            root / MODEL, digest_directory(root / MODEL), [target.name for target in targets]
        )
    _compare(params, root, peers)
    checkpoint.remove()
    return (
        f"{params.train.backbone}: {trained.parameters:,} parameters, {len(curves)} epochs of "
        f"{trained.events:,} events in {trained.seconds:.0f} s ({speed:,.0f} events/s, "
        f"{_tell_flops(flops, peak, params.train, device)}, "
        f"peak memory {tell_memory(memory)}), "
        f"final loss {curves[-1]['loss']:.4f}, in {MODEL}"
    )


def _compare(params: Params, root: Path, peers: Peers) -> None:
    """Pretrain, train and ask the backbones that are to be compared; write their predictions."""
    finished: list[Checkpoint] = []
    with replace_directory(root / COMPARED) as folder:
        write_json(folder / "backbones.json", list(params.train.compare))
        for backbone in params.train.compare:
            table, checkpoints = _predict_with(backbone, params, root, peers)
            write_table(folder / f"with_{backbone}.parquet", table)
            finished += checkpoints
    # Not before all are in place: a killed run has none of them.
    for checkpoint in finished:
        checkpoint.remove()


def _predict_with(
    backbone: Backbone, params: Params, root: Path, peers: Peers
) -> tuple[pa.Table, list[Checkpoint]]:
    """Train another backbone behind the same heads, alone; return predictions and checkpoints."""
    settings = _choose_alone(backbone, params.train)
    own = params.model_copy(update={"train": settings})
    sequences, periods, targets, vocabulary = load_inputs(root)
    inputs = (sequences, periods, targets, settings)
    before = open_checkpoint(root, f"pretrain_{backbone}", own)
    checkpoint = open_checkpoint(root, f"train_{backbone}", own)
    pretrained = pretrain_model(
        *inputs, params.pretrain, vocabulary, checkpoint=before, peers=peers
    )
    trained = train_model(
        *inputs, vocabulary, pretrained=pretrained, checkpoint=checkpoint, peers=peers
    )
    return predict_alone(trained, sequences, root, settings), [before, checkpoint]


def _choose_alone(backbone: Backbone, settings: Train) -> Train:
    """Return the settings of another backbone that is compared.

    Of several members there is one, and no trees beside it: compare with the network alone.
    """
    alone = {"backbone": backbone, "compare": (), "members": 1, "trees": EnsembleTrees(rounds=0)}
    return settings.model_copy(update=alone)


def predict_alone(
    trained: TrainedModel, sequences: Sequences, root: Path, settings: Train
) -> pa.Table:
    """Predict the calibration and test rows by a model that is no candidate."""
    features = root / FEATURES
    (table,), _ = predict(
        [(trained.first, trained.shipped)],
        sequences,
        features,
        read_json(features / "cuts.json"),
        workers=count_workers(settings),
    )
    return table


def _utilisation(flops: float, peak: float | None) -> dict[str, float]:
    """Return model FLOPs utilisation, nothing where the machine's peak is not known."""
    return {} if peak is None else {"mfu": flops / peak}


def _tell_flops(flops: float, peak: float | None, config: Train, device: torch.device) -> str:
    """Say how many operations a second that is, and of what peak."""
    told = f"{flops / 1e9:,.1f} GFLOPS"
    if peak is None:
        return f"{told}, MFU unknown: no peak is known of this device"
    kind = str(choose_precision(config)).removeprefix("torch.")
    origin = "the data sheet's" if device.type == "cuda" else "a measured"
    return f"{told}, MFU {flops / peak:.1%} of {origin} {peak / 1e9:,.0f} GFLOPS in {kind}"


def measure_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process held so far, MiB, and of a GPU PyTorch's tensors."""
    memory = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        memory["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return memory


def tell_memory(memory: dict[str, float]) -> str:
    """Say it."""
    told = f"{memory['peak_memory_mib']:,.0f} MiB"
    if "peak_gpu_memory_mib" in memory:
        told += f", of the GPU {memory['peak_gpu_memory_mib']:,.0f} MiB"
    return told


def load_inputs(
    root: Path,
) -> tuple[Sequences, Periods, tuple[Target, ...], Vocabulary]:
    """Return sequences, bounds, targets and vocabulary of data/features.

    Raises:
        UserError: a file is missing or damaged.
    """
    features = root / FEATURES
    schema, cuts = read_json(features / "schema.json"), read_json(features / "cuts.json")
    return (
        Sequences.load(features / "sequences"),
        read_periods(cuts, schema["population_active_within_days"]),
        tuple(Target(**target) for target in schema["targets"]),
        read_vocabulary(features),
    )


def load_pretrained(root: Path) -> dict[str, torch.Tensor]:
    """Return the weights of models/pretrained, none where pretraining is switched off.

    Raises:
        UserError: it is missing or damaged.
    """
    folder = root / PRETRAINED
    if not read_json(folder / "config.json")["weights"]:
        return {}
    try:
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
        return weights
    except (OSError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS}: not readable; run pretrain ({line})") from None


def open_checkpoint(root: Path, name: str, params: Params) -> Checkpoint:
    """Return where a killed training left off: of these data, settings and code alone."""
    pretrained = root / PRETRAINED
    parts = {
        "data": digest_directory(root / FEATURES),
        "pretrained": digest_directory(pretrained) if name == CHECKPOINT else None,
        "code": digest_directory(Path(pipelines.model.__file__).parent, pattern="*.py"),
        "train": params.train.model_dump(),
        "pretrain": params.pretrain.model_dump(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Checkpoint(root / ".forecart/checkpoints" / f"{name}.safetensors", key)


def read_periods(cuts: dict[str, Any], active_days: float | None) -> Periods:
    """Return the bounds of both fits from cuts.json."""
    by_split: dict[str, list[int]] = {}
    for cut in cuts["cuts"]:
        by_split.setdefault(cut["split"], []).append(cut["ts_us"])
    begin, first_cut = to_us(datetime.fromisoformat(cuts["first_ts"])), by_split["train"][0]
    # Before the first cut in any case: of a short log the longest windows fit in only there.
    history = min(_HISTORY_DAYS * DAY, (first_cut - begin) // 2)
    return Periods(
        first=begin + history,
        calibration=by_split["calibration"][0],
        test=by_split["test"][0],
        active_days=active_days,
    )


def read_vocabulary(features: Path) -> Vocabulary:
    """Return codes and scales that the features stage fitted."""
    codes, scales = read_json(features / "vocabulary.json"), read_json(features / "scalers.json")
    return Vocabulary.from_json(codes | scales)


def predict(
    pairs: Sequence[tuple[Predictor, Predictor]],
    sequences: Sequences,
    features: Path,
    cuts: dict[str, Any],
    *,
    next_items: int = 0,
    workers: int = 1,
) -> tuple[list[pa.Table], pa.Table]:
    """Predict the calibration rows by the first fit, the test rows by the refitted model.

    Args:
        pairs: of both, of the same networks; if any has trees, the first pair has the same.
        sequences: all events.
        features: data/features.
        cuts: of its cuts.json.
        next_items: how many items are ranked at the test rows, by those that come next.
        workers: batches that are looked at side by side.

    Returns:
        A table for every pair, and one of the items.

    Raises:
        UserError: the snapshot table is missing or damaged.
    """
    user, cut = _read_rows(features)
    timeline = Timeline(sequences)
    tables: list[list[pa.Table]] = [[] for _ in pairs]
    items = []
    for entry in cuts["cuts"]:
        if entry["split"] not in ("calibration", "test"):
            continue
        is_test = entry["split"] == "test"
        models = [pair[is_test] for pair in pairs]
        users = user[cut == entry["index"]]
        ts = np.full(len(users), entry["ts_us"], dtype=np.int64)
        rows = {
            "user": pa.array(users, pa.int32()),
            "cut": pa.array(np.full(len(users), entry["index"]), pa.int32()),
        }
        ahead, scores = models[0].parts(
            timeline,
            timeline.cuts(users.astype(np.int64), ts),
            next_items if is_test else 0,
            workers,
        )
        for model, parts in zip(models, tables, strict=True):
            parts.append(pa.table(rows | model.finish(model.join(ahead.raw, scores))))
        if is_test:
            told = {
                "items": pa.array(list(ahead.items), pa.list_(pa.int32())),
                "probability": pa.array(list(ahead.chances), pa.list_(pa.float32())),
            }
            items.append(pa.table(rows | told))
    return [pa.concat_tables(parts) for parts in tables], pa.concat_tables(items)


def _read_rows(features: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return user and cut of every snapshot."""
    path = features / "snapshots.parquet"
    try:
        rows = pq.read_table(path, columns=["user", "cut"])
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not readable; run the features stage ({error})") from None
    return rows["user"].to_numpy(), rows["cut"].to_numpy()


def format_curves(curves: list[dict[str, float]]) -> str:
    """Return losses by epoch as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for epoch in curves:
        writer.writerow([f"{epoch[name]:.6g}" for name in _COLUMNS])
    return text.getvalue()
