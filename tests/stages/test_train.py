"""The train stage on a tiny shop, with a real MLflow store in a folder of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipelines.config import Cuts, Params, Pretrain
from pipelines.errors import UserError
from pipelines.events import to_us
from pipelines.features.cuts import describe_cuts, plan_cuts
from pipelines.features.store import encode_events
from pipelines.io import digest_directory, write_json, write_table
from pipelines.model import fitting
from pipelines.model.peers import launch
from pipelines.model.predictor import WEIGHTS, Predictor
from pipelines.model.timeline import DAY, Timeline, population
from pipelines.model.training import train_model
from pipelines.registry.champion import DIGEST_TAG, locate_files
from pipelines.registry.connection import connect
from pipelines.registry.tracking import DATA_TAG, EXPERIMENT, track
from pipelines.stages import pretrain, train
from pipelines.stages.baselines import choose_lstm_settings
from pipelines.stages.train import (
    load_inputs,
    load_pretrained,
    open_checkpoint,
    read_periods,
)

ROOT = Path(__file__).resolve().parents[2]
START = 1_700_000_000_000_000 // DAY * DAY
CUTS = {0: 30, 1: 36, 2: 40, 3: 47}  # days after the start
SPLITS = ("train", "between", "calibration", "test")


def iso(days: int) -> str:
    return datetime.fromtimestamp((START + days * DAY) / 1e6, UTC).isoformat()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rng = np.random.default_rng(0)
    kinds = ["view", "search", "purchase"]
    users = [
        [
            {
                "ts": START + int(at),
                "event_type": kinds[int(rng.integers(3))],
                "category": "shoes",
                "price": 9.0,
            }
            for at in np.sort(rng.integers(54 * DAY, size=30))
        ]
        for _ in range(40)
    ]
    sequences = encode_events(users)
    features = tmp_path / train.FEATURES
    (features / "sequences").mkdir(parents=True)
    sequences.save(features / "sequences")
    target = {"kind": "binary", "event": "purchase", "horizon_days": 7, "name": "purchase_7d"}
    spend = {"kind": "amount", "event": None, "horizon_days": 7, "name": "spend_7d"}
    schema = {"targets": [target, spend], "population_active_within_days": 14}
    write_json(features / "schema.json", schema)
    cuts = [
        {"index": i, "ts": iso(d), "ts_us": START + d * DAY, "split": SPLITS[i]}
        for i, d in CUTS.items()
    ]
    write_json(
        features / "cuts.json",
        {"first_ts": iso(0), "last_ts": iso(54), "end_ts": iso(54), "cuts": cuts},
    )
    codes = {"category": [int(sequences.category[0])], "brand": [], "gender": [], "region": []}
    codes |= {"item": [], "item_id": []}
    write_json(features / "vocabulary.json", codes)
    scale = {"mean": 0.0, "std": 1.0}
    write_json(features / "scalers.json", {"log_price": scale, "log_quantity": scale, "age": scale})
    timeline = Timeline(sequences)
    rows = [population(timeline, START + d * DAY, 14.0).user for d in CUTS.values()]
    write_table(
        features / "snapshots.parquet",
        pa.table(
            {
                "user": pa.array(np.concatenate(rows), pa.int32()),
                "cut": pa.array(np.repeat(list(CUTS), [len(r) for r in rows]), pa.int32()),
            }
        ),
    )
    return tmp_path


PARAMS = Params.model_validate(
    {
        "train": {
            "width": 16,
            "heads": 2,
            "context": 16,
            "stride": 8,
            "epochs": 2,
            "tokens_per_batch": 256,
            "device": "cpu",
        }
    }
)


# Another value of every setting of train.
OTHERWISE: dict[str, Any] = {
    "backbone": "lstm",
    "compare": ["mlp"],
    "device": "auto",
    "processes": 2,
    "threads": 2,
    "precision": "bfloat16",
    "compile": True,
    "width": 32,
    "layers": 1,
    "heads": 1,
    "context": 32,
    "stride": 4,
    "epochs": 3,
    "refit_epochs": 2,
    "cuts_per_user": 3,
    "tokens_per_batch": 512,
    "accumulate": 2,
    "learning_rate": 0.05,
    "refit_rate": 0.5,
    "weight_decay": 0.5,
    "dropout": 0.5,
    "next_event_weight": 0.7,
    "amount_weight": 0.7,
    "fusion": False,
    "members": 2,
    "trees": {"rounds": 3},
    "item_buckets": 16,
    "half_life_days": 3.0,
    "next_items": 7,
    "item_weight": 0.7,
    "query_buckets": 16,
    "seed": 5,
}


def change_unlisted(stage: str) -> Params:
    """Change every setting of train that dvc.yaml does not name for a stage."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    listed = set(graph[stage]["params"])
    others = {k: v for k, v in OTHERWISE.items() if f"train.{k}" not in listed}
    settings = PARAMS.model_dump(mode="json", by_alias=True)
    changed = Params.model_validate(settings | {"train": settings["train"] | others})
    assert OTHERWISE.keys() == type(PARAMS.train).model_fields.keys()
    assert all(getattr(changed.train, name) != getattr(PARAMS.train, name) for name in others)
    return changed


def test_pretrain_reads_no_setting_that_dvc_does_not_know_of(root: Path) -> None:
    pretrain.run(PARAMS, root)
    before = digest_directory(root / train.PRETRAINED)
    pretrain.run(change_unlisted("pretrain"), root)
    assert digest_directory(root / train.PRETRAINED) == before


def test_the_lstm_is_trained_as_the_model_and_dvc_knows_how() -> None:
    settings = choose_lstm_settings(change_unlisted("baselines"))
    assert settings == choose_lstm_settings(PARAMS)
    assert (settings.epochs, settings.tokens_per_batch, settings.device) == (2, 256, "cpu")
    own = {"epochs": 4, "tokens_per_batch": 1024}
    asked = PARAMS.model_dump(mode="json", by_alias=True) | {"baselines": {"lstm": own}}
    settings = choose_lstm_settings(Params.model_validate(asked))
    assert (settings.epochs, settings.tokens_per_batch, settings.device) == (4, 1024, "cpu")


def test_trains_predicts_and_logs(root: Path) -> None:
    said = pretrain.run(PARAMS, root)
    assert re.search(r"next-event loss [\d.]+ \([\d,]+ events/s, peak memory [\d,]+ MiB\)", said)
    said = train.run(PARAMS, root)
    assert "events/s" in said
    assert re.search(r"GFLOPS, MFU \d+\.\d% of a measured [\d,]+ GFLOPS in float32", said)

    rows = pq.read_table(root / train.FEATURES / "snapshots.parquet")
    held_out = rows.filter(pa.compute.greater(rows["cut"], 1))
    predictions = pq.read_table(root / train.PREDICTIONS)
    assert predictions.column_names == ["user", "cut", "purchase_7d", "spend_7d"]
    assert predictions.select(["user", "cut"]).equals(held_out)
    model = Predictor.load(root / train.MODEL)
    assert 0 < model.spec.thresholds["purchase_7d"] < 1
    first_test = next(day for i, day in CUTS.items() if SPLITS[i] == "test")
    assert model.spec.learnt_until == START + first_test * DAY

    digest = digest_directory(root / train.MODEL)
    store = connect(root)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (found,) = store.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags[DIGEST_TAG] == digest
    assert found.data.tags[DATA_TAG] == digest_directory(root / train.FEATURES)
    assert found.data.params["width"] == "16"
    assert len(store.get_metric_history(found.info.run_id, "loss")) == 3
    for name in ("mfu", "flops_per_s"):
        assert len(store.get_metric_history(found.info.run_id, name)) == 3
    assert 0 < found.data.metrics["train_mfu"] < 1
    assert found.data.metrics["train_flops_per_s"] > 0
    (output,) = found.outputs.model_outputs
    logged = store.get_logged_model(output.model_id)
    files = Path(logged.artifact_location.removeprefix("file://"))
    assert "signature" in (files / "MLmodel").read_text()
    assert digest_directory(locate_files(files)) == digest

    # A stage is a pure function of its inputs.
    curves = (root / train.CURVES).read_bytes()
    train.run(PARAMS, root)
    assert digest_directory(root / train.MODEL) == digest
    assert (root / train.CURVES).read_bytes() == curves
    assert pq.read_table(root / train.PREDICTIONS).equals(predictions)


@pytest.mark.integration
def test_other_backbones_are_compared(root: Path) -> None:
    pretrain.run(PARAMS, root)
    train.run(PARAMS, root)
    alone = pq.read_table(root / train.ALONE)
    assert not list((root / train.COMPARED).glob("*.parquet"))
    settings = PARAMS.train.model_copy(update={"compare": ("cnn", "mlp")})
    train.run(PARAMS.model_copy(update={"train": settings}), root)
    assert pq.read_table(root / train.ALONE).equals(alone)
    files = sorted((root / train.COMPARED).glob("*.parquet"))
    assert [file.name for file in files] == ["with_cnn.parquet", "with_mlp.parquet"]
    cnn, mlp = (pq.read_table(file) for file in files)
    for table in (cnn, mlp):
        assert table.drop_columns(["purchase_7d", "spend_7d"]).equals(alone.select(["user", "cut"]))
    assert not cnn["purchase_7d"].equals(mlp["purchase_7d"])
    assert not cnn["purchase_7d"].equals(alone["purchase_7d"])
    assert not list((root / ".forecart/checkpoints").iterdir())


@pytest.mark.integration
def test_a_comparison_that_is_killed_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PARAMS.train.model_copy(update={"compare": ("cnn", "mlp")})
    params = PARAMS.model_copy(update={"train": settings})
    pretrain.run(params, root)
    steps: list[str] = []
    real = fitting.Fit._train_step

    def step(fit: Any, *given: Any) -> Any:
        steps.append(fit.config.backbone)
        if len(steps) == dies_at:
            raise KeyboardInterrupt
        return real(fit, *given)

    monkeypatch.setattr(fitting.Fit, "_train_step", step)
    dies_at = 0
    train.run(params, root)
    whole = {file.name: file.read_bytes() for file in (root / train.COMPARED).iterdir()}
    dies_at, count = steps.index("mlp") + 3, len(steps)
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        train.run(params, root)
    dies_at = count + 1
    steps.clear()
    train.run(params, root)
    assert set(steps) == {"mlp"}
    assert {file.name: file.read_bytes() for file in (root / train.COMPARED).iterdir()} == whole


def test_the_settings_threshold_reaches_the_model(root: Path) -> None:
    pretrain.run(PARAMS, root)
    stored = {}
    for objective in ("f1", "break_even"):
        params = PARAMS.model_copy(
            update={"evaluation": PARAMS.evaluation.model_copy(update={"threshold": objective})}
        )
        train.run(params, root)
        stored[objective] = Predictor.load(root / train.MODEL).spec.thresholds["purchase_7d"]
    assert stored["f1"] != stored["break_even"]


def test_an_unknown_device_has_no_utilisation() -> None:
    cuda = torch.device("cuda")
    assert train._utilisation(1e12, None) == {}
    assert "MFU unknown" in train._tell_flops(1e12, None, PARAMS.train, cuda)
    told = train._tell_flops(1e12, 4e12, PARAMS.train, cuda)
    assert "MFU 25.0% of the data sheet's 4,000 GFLOPS" in told


def test_a_failed_training_is_marked(root: Path) -> None:
    with pytest.raises(RuntimeError), track(root, params={}, data_digest="sha256:0", name="gpt"):
        raise RuntimeError
    store = connect(root)
    (found,) = store.search_runs([e.experiment_id for e in store.search_experiments()])
    assert found.info.status == "FAILED"


def test_missing_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data/features"):
        train.run(PARAMS, tmp_path)


@pytest.mark.parametrize("stage", [pretrain, train])
def test_a_champion_that_cannot_be_had_is_told_before_the_training(
    root: Path, stage: ModuleType
) -> None:
    """Not by the evaluation after it."""
    champion = {"digest": f"sha256:{'0' * 64}", "version": 1, "verdict": None}
    write_json(root / "champion.json", champion)
    with pytest.raises(UserError, match=r"champion\.json: its registry"):
        stage.run(PARAMS, root)


def test_a_missing_pretraining_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="models/pretrained"):
        train.run(PARAMS, root)


def test_without_pretraining(root: Path) -> None:
    params = PARAMS.model_copy(update={"pretrain": Pretrain(epochs=0)})
    assert "switched off" in pretrain.run(params, root)
    assert load_pretrained(root) == {}


@pytest.mark.integration
def test_a_killed_training_goes_on_where_it_was(root: Path) -> None:
    """A process killed in an epoch leaves a checkpoint, from which the same model comes."""
    pretrain.run(PARAMS, root)
    train.run(PARAMS, root)
    digest = digest_directory(root / train.MODEL)
    curves = (root / train.CURVES).read_bytes()

    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS.model_dump(mode="json", by_alias=True)))
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pipelines.config import load_params\n"
        "from pipelines.model import fitting\n"
        "from pipelines.stages import train\n"
        "step, seen = fitting.Fit._train_step, []\n"
        "def dying(self, *given):\n"
        "    seen.append(0)\n"
        "    if sum(self.done.values()) == 1 and len(seen) % 5 == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *given)\n"
        "fitting.Fit._train_step = dying\n"
        "train.run(load_params(Path('params.yaml')))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = root / ".forecart/checkpoints/train-0.safetensors"
    assert checkpoint.exists()

    told: list[dict[str, float]] = []
    sequences, periods, targets, vocabulary = load_inputs(root)
    resumed = train_model(
        sequences,
        periods,
        targets,
        PARAMS.train,
        vocabulary,
        told.append,
        pretrained=load_pretrained(root),
        checkpoint=open_checkpoint(root, train.CHECKPOINT, PARAMS),
    )
    assert [epoch["epoch"] for epoch in told] == [1, 2, 3]
    assert len({epoch["events_per_s"] for epoch in told}) == 3
    (root / "resumed").mkdir()
    resumed.save(root / "resumed")
    assert digest_directory(root / "resumed") == digest

    train.run(PARAMS, root)
    assert digest_directory(root / train.MODEL) == digest
    assert (root / train.CURVES).read_bytes() == curves
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("days", "horizons", "settings", "history"),
    [
        (180, [7, 14, 28], {}, 7.0),
        (10, [1, 2], {"min_history_days": 2, "step_days": 1}, 2.0),  # first cut: day 4
        (7, [1, 2], {"min_history_days": 1, "step_days": 1}, 0.5),  # as short as can be
    ],
)
def test_the_longest_windows_fit_in_before_the_calibration_cut(
    days: int, horizons: list[int], settings: dict[str, int], history: float
) -> None:
    begin = datetime(2025, 3, 1, tzinfo=UTC)
    cuts = plan_cuts(
        begin,
        begin + timedelta(days=days),
        horizons_days=horizons,
        params=Cuts(train=1 if settings else 8, **settings),
    )
    last = begin + timedelta(days=days)
    periods = read_periods(describe_cuts(cuts, first=begin, last=last, end=last), 14.0)
    assert periods.first == to_us(begin) + history * DAY
    assert periods.first + horizons[-1] * DAY < periods.calibration


def set_train(**settings: Any) -> Params:
    params = PARAMS.model_dump(mode="json", by_alias=True)
    return Params.model_validate(params | {"train": params["train"] | settings})


def launch_stage(name: str, params: Params, root: Path) -> subprocess.Popen[str]:
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", name],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(stage: subprocess.Popen[str]) -> str:
    out, told = stage.communicate(timeout=240)
    assert (stage.returncode, told) == (0, "")
    return out


@pytest.mark.integration
def test_processes_that_share_the_steps_learn_the_same(root: Path) -> None:
    """Sums round otherwise at most: which units are dropped out is each process's own."""
    alone = set_train(accumulate=2, dropout=0.0, compare=["mlp"])
    shared = set_train(accumulate=2, dropout=0.0, compare=["mlp"], processes=2)
    tables = [root / train.PREDICTIONS, root / train.COMPARED / "with_mlp.parquet"]

    def read() -> list[dict[str, torch.Tensor]]:
        found = [load_file(root / folder / WEIGHTS) for folder in (train.PRETRAINED, train.MODEL)]
        for table in map(pq.read_table, tables):
            columns = zip(table.column_names, table.columns, strict=True)
            found.append({name: torch.tensor(column.to_numpy()) for name, column in columns})
        return found

    pretrain.run(alone, root)
    said = train.run(alone, root)
    expected = read()
    finish(launch_stage("pretrain", shared, root))
    out = finish(launch_stage("train", shared, root))
    assert len(out.splitlines()) == 1
    assert said.partition(" in ")[0] in out  # as many parameters, epochs and events
    for one, two in zip(expected, read(), strict=True):
        assert list(one) == list(two)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.integration
def test_a_shared_training_that_is_killed_goes_on_to_the_same_weights(root: Path) -> None:
    params = set_train(accumulate=2, processes=2, epochs=3)
    pretrain.run(params, root)
    finish(launch_stage("train", params, root))
    whole = digest_directory(root / train.MODEL)
    checkpoint = root / ".forecart/checkpoints/train-0.safetensors"
    assert not checkpoint.exists()
    stage = launch_stage("train", params, root)
    until = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.01)
    stage.kill()
    stage.communicate(timeout=60)
    assert checkpoint.exists()
    finish(launch_stage("train", params, root))
    assert digest_directory(root / train.MODEL) == whole


@pytest.mark.integration
def test_other_settings_on_another_machine_are_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each would step by a decay of its own, and nobody notice that the weights part."""
    for rank, decay in enumerate([0.01, 0.02]):
        params = set_train(accumulate=2, weight_decay=decay, threads=1 + rank)
        text = yaml.safe_dump(params.model_dump(mode="json", by_alias=True))
        (root / f"params-{rank}.yaml").write_text(text)
    monkeypatch.chdir(root)
    stage = 'exec "$0" -P -m pipelines.cli pretrain --params "params-$RANK.yaml"'
    assert launch(["sh", "-c", stage, sys.executable], 2) == 2
    told = capfd.readouterr().err
    assert "differ in their batches or settings; all machines need" in told
    assert len(told.splitlines()) == 1
