"""One training as a run in MLflow: settings, curves, lineage, and the model without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import UserError
from pipelines.evaluation.rivals import CANDIDATE
from pipelines.io import digest_directory, read_json
from pipelines.registry.champion import DIGEST_TAG, check_files
from pipelines.registry.connection import connect
from pipelines.registry.verdict import VERDICT, read_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun

EXPERIMENT: Final = "forecart"
DATA_TAG: Final = "forecart.data_digest"
PASSED_TAG: Final = "forecart.passed"
TRAINING_TAG: Final = "forecart.training"  # what is trained, with which settings
HOST_TAG: Final = "forecart.host"
PROCESS_TAG: Final = "forecart.process"  # its number and when it started
ARTIFACTS: Final = "mlartifacts"

EVALUATION: Final = Path("reports/evaluation.json")
# Of the candidate, by the kind of target: how well it ranks, and how well its level is met.
_METRICS: Final[Mapping[str, Sequence[str]]] = {
    "binary": ("roc_auc", "pr_auc", "log_loss", "ece"),
    "amount": ("gini", "total_ratio"),
}
# A clock that is set right moves the start of every process a little.
_CLOCK_SECONDS: Final = 10

# What the name of a metric may not hold.
_UNNAMEABLE: Final = re.compile(r"[^\w.\- /]")

# Name of the model within its run, of our flavour in the MLmodel file, and of its folder there.
MODEL_NAME: Final = "behaviour"
FLAVOUR: Final = "forecart"
FILES: Final = "model"


class Run:
    """A run that is going on."""

    def __init__(self, store: MlflowClient, run_id: str, experiment_id: str) -> None:
        self._store = store
        self._experiment_id = experiment_id
        self.run_id = run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._store.log_batch(
            self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()]
        )

    def log_artifact(self, path: Path) -> None:
        """Log a file."""
        self._store.log_artifact(self.run_id, str(path))

    def log_model(self, folder: Path, digest: str, outputs: Sequence[str]) -> None:
        """Log a model and tag the run with its digest.

        Args:
            folder: safetensors and JSON files, nothing else.
            digest: of the folder.
            outputs: columns that the model predicts.

        Raises:
            UserError: the folder holds other files, or others than those with the digest.
        """
        from mlflow.entities import LoggedModelOutput

        check_files(folder)
        model = self._store.create_logged_model(
            self._experiment_id, MODEL_NAME, source_run_id=self.run_id, tags={DIGEST_TAG: digest}
        )
        upload_model(self._store, model, folder, digest, outputs)
        self._store.finalize_logged_model(model.model_id, "READY")
        self._store.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        self._store.set_tag(self.run_id, DIGEST_TAG, digest)


@contextmanager
def track(
    root: Path,
    *,
    params: Mapping[str, Any],
    data_digest: str,
    name: str,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Open a run; it is marked as failed when the block raises.

    A killed process cannot mark its own: the next run of the same training does it.

    Args:
        root: the project's folder.
        params: settings, logged by name.
        data_digest: what the model learns from.
        name: of the run.
        tags: more of them.
    """
    import psutil
    from mlflow.entities import Param, RunTag

    store = connect(root)
    experiment_id = _find_experiment(store, root)
    settings = {key: str(value) for key, value in params.items()}
    training = hashlib.sha256(
        json.dumps([name, data_digest, settings], sort_keys=True).encode()
    ).hexdigest()[:16]
    _end_killed(store, experiment_id, training)
    run = store.create_run(experiment_id, run_name=name)
    own = {
        DATA_TAG: data_digest,
        TRAINING_TAG: training,
        HOST_TAG: platform.node(),
        PROCESS_TAG: f"{os.getpid()} {psutil.Process().create_time():.0f}",
    }
    all_tags = own | dict(tags or {})
    revision = read_revision(root)
    if revision is not None:
        all_tags["mlflow.source.git.commit"] = revision
    store.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in settings.items()],
        tags=[RunTag(key, value) for key, value in all_tags.items()],
    )
    _log_dataset(store, run.info.run_id, data_digest)
    try:
        yield Run(store, run.info.run_id, experiment_id)
    except BaseException:
        store.set_terminated(run.info.run_id, status="FAILED")
        raise
    store.set_terminated(run.info.run_id)


def _end_killed(store: MlflowClient, experiment_id: str, training: str) -> None:
    """End what earlier, killed processes of a training have left running.

    Others may train the same at this moment, in another folder or on another machine. Whether a
    process lives is known of this machine's alone.
    """
    left = store.search_runs(
        [experiment_id],
        f"attributes.status = 'RUNNING' and tags.`{TRAINING_TAG}` = '{training}' "
        f"and tags.`{HOST_TAG}` = '{platform.node()}'",
    )
    for run in left:
        pid, _, started = run.data.tags.get(PROCESS_TAG, "").partition(" ")
        if pid and not _lives(int(pid), float(started)):
            store.set_terminated(run.info.run_id, status="KILLED")


def _lives(pid: int, started: float) -> bool:
    """Tell whether a process is still there, and not another one that was given its number."""
    import psutil

    try:
        process = psutil.Process(pid)
        # A killed one stays until its parent has looked.
        gone = process.status() == psutil.STATUS_ZOMBIE
        return not gone and abs(process.create_time() - started) < _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # somebody else's
        return True


def upload_model(
    store: MlflowClient, model: LoggedModel, folder: Path, digest: str, outputs: Sequence[str]
) -> None:
    """Give a logged model its files, for the first time or again.

    Args:
        store: that knows the model.
        model: that was logged.
        folder: safetensors and JSON files, nothing else.
        digest: of the folder.
        outputs: columns that the model predicts.

    Raises:
        UserError: the folder has another digest by now.
    """
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="forecart-") as temporary:
        copy = Path(temporary) / FILES
        shutil.copytree(folder, copy)
        if digest_directory(copy) != digest:
            raise UserError(f"{folder}: changed meanwhile; try again")
        description = Model(
            artifact_path=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            signature=_describe_signature(outputs),
        )
        # A flavour of our own: there is no pickle that a generic loader could open.
        description.add_flavor(FLAVOUR, data=FILES, loader="pipelines.model.predictor")
        description.save(str(Path(temporary) / "MLmodel"))
        store.log_model_artifacts(model.model_id, temporary)


def _log_dataset(store: MlflowClient, run_id: str, digest: str) -> None:
    """Tell MLflow's pages what the run learned from; a dataset's digest has 36 letters at most."""
    from mlflow.entities import Dataset, DatasetInput

    short = digest.removeprefix("sha256:")[:32]
    source = json.dumps({"digest": digest})
    dataset = Dataset(name="features", digest=short, source_type="dvc", source=source)
    store.log_inputs(run_id, [DatasetInput(dataset)])


def attach(root: Path, digest: str, files: Sequence[Path]) -> str | None:
    """Put files, and how good the model is, beside the newest training run that made a model.

    Args:
        root: the project's folder.
        digest: of the model.
        files: existing ones.

    Returns:
        The run's address relative to MLflow's pages, or None when no run is known.
    """
    store = connect(root)
    run = _find_run(store, root, digest)
    if run is None:
        return None
    for file in files:
        store.log_artifact(run.info.run_id, str(file))
    _log_quality(store, run, root, digest)
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def log_quality(store: MlflowClient, root: Path, digest: str) -> None:
    """Log how good a model is to the newest training run that made it, so that runs compare.

    Args:
        store: that knows the run.
        root: the project's folder; its reports are taken if they are about the model.
        digest: of the model.
    """
    run = _find_run(store, root, digest)
    if run is not None:
        _log_quality(store, run, root, digest)


def _find_run(store: MlflowClient, root: Path, digest: str) -> MlflowRun | None:
    """Return the newest training run that made a model."""
    found = store.search_runs(
        [_find_experiment(store, root)],
        f"tags.`{DIGEST_TAG}` = '{digest}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return found[0] if found else None


def _log_quality(store: MlflowClient, run: MlflowRun, root: Path, digest: str) -> None:
    """Log the main metrics of every target and the verdict; what is there already stays.

    The evaluation does not tell which model it is about; the verdict, which follows from it, does.
    """
    from mlflow.entities import Metric, RunTag

    verdict_file, evaluation_file = root / VERDICT, root / EVALUATION
    if not verdict_file.exists() or not evaluation_file.exists():
        return
    verdict = read_verdict(verdict_file)
    if verdict["candidate"] != digest:
        return
    found = {}
    for name, target in read_json(evaluation_file)["targets"].items():
        scores = target["models"].get(CANDIDATE, {})
        for metric in _METRICS[target["kind"]]:
            value = scores.get(metric, {}).get("value")
            if value is not None:
                found[_UNNAMEABLE.sub("_", f"test_{metric}_{name}")] = float(value)
    now = int(time.time() * 1000)
    known = run.data.metrics
    metrics = [Metric(k, v, now, 0) for k, v in found.items() if known.get(k) != v]
    passed = str(verdict["passed"]).lower()
    tags = [RunTag(PASSED_TAG, passed)] if run.data.tags.get(PASSED_TAG) != passed else []
    if metrics or tags:
        store.log_batch(run.info.run_id, metrics=metrics, tags=tags)


def read_revision(root: Path) -> str | None:
    """Return the git commit of the project, or None where there is none."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _find_experiment(store: MlflowClient, root: Path) -> str:
    """Return the experiment's id; one that somebody deleted is restored, with its runs.

    MLflow keeps the name of a deleted one, so that there can be no other, and the versions in the
    registry have their files in its runs.
    """
    found = store.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            store.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    location = _place_artifacts(str(store.tracking_uri), root)
    return str(store.create_experiment(EXPERIMENT, artifact_location=location))


def _place_artifacts(uri: str, root: Path) -> str | None:
    """Return where artifacts of a local store are kept: beside it, whoever's run comes first.

    A server (http) decides for itself.
    """
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        return ((root / database).resolve().parent / ARTIFACTS).as_uri()
    return (root.resolve() / ARTIFACTS).as_uri() if uri.startswith("file:") else None


def _describe_signature(outputs: Sequence[str]) -> Any:
    """Events of one user in, one number per target out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from pipelines.events import EVENT_SCHEMA

    kinds = {"timestamp[us, tz=UTC]": DataType.datetime, "double": DataType.double}
    inputs = [
        ColSpec(kinds.get(str(f.type), DataType.string), f.name, required=not f.nullable)
        for f in EVENT_SCHEMA
    ]
    return ModelSignature(
        inputs=Schema(inputs),
        outputs=Schema([ColSpec(DataType.float, name) for name in outputs]),
    )
