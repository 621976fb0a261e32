"""`forecart tune`: searches, logs every trial below one MLflow run, writes the best settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from pipelines.config import Params, parse_params
from pipelines.io import digest_directory, write_text
from pipelines.model.tuning import SEARCHED, make_study, search, write_settings
from pipelines.registry.tracking import track
from pipelines.stages.train import FEATURES, load_inputs

STORAGE: Final = Path(".forecart/tuning.db")
# What trials keep: those of studies that kept something else are not gone on with.
_KEPT: Final = "losses by part"
PARENT_TAG: Final = "mlflow.parentRunId"
PRUNED_TAG: Final = "forecart.pruned"


def tune(params: Params, file: Path, root: Path, *, trials: int, write: bool) -> str:
    """Search until the study of these data and settings holds so many trials.

    Args:
        params: settings as they are.
        file: where they stand; gets the best ones.
        root: the project's folder.
        trials: in all; those of an earlier, interrupted call count.
        write: change the file.

    Returns:
        Lines for people.

    Raises:
        UserError: data/features is missing, the file is written in a way that cannot be changed, or
            it would be refused with the best settings.
    """
    if write:
        # A file that cannot be written to is better refused before the search than after it.
        write_settings(file.read_text(), "train", {n: getattr(params.train, n) for n in SEARCHED})
    sequences, periods, targets, vocabulary = load_inputs(root)
    data = digest_directory(root / FEATURES)
    settings = params.train.model_dump()
    parts = [_KEPT, data, settings, params.pretrain.model_dump()]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    (root / STORAGE).parent.mkdir(parents=True, exist_ok=True)
    study = make_study(f"sqlite:///{(root / STORAGE).resolve()}", name, params.train.seed)
    with track(root, params=settings, data_digest=data, name="tune") as parent:

        def note(number: int, changes: Mapping[str, Any], loss: float | None) -> None:
            tags = {PARENT_TAG: parent.run_id, PRUNED_TAG: str(loss is None).lower()}
            with track(
                root, params=changes, data_digest=data, name=f"trial {number}", tags=tags
            ) as run:
                if loss is not None:
                    run.log_metrics({"calibration_log_loss": loss}, step=0)

        found = search(
            sequences,
            periods,
            targets,
            params.train,
            params.pretrain,
            vocabulary,
            study,
            trials=trials,
            confidence=params.evaluation.confidence,
            on_trial=note,
        )
        parent.log_metrics({"calibration_log_loss": found.loss}, step=0)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in found.best.items())
    low, high = found.gain
    lines = [
        f"{found.trials} trials: log loss {found.loss:.5f} on the calibration cut, "
        f"{found.current:.5f} with the settings as they were "
        f"(better by {low:.5f} to {high:.5f})",
        f"Best:  {shown}",
    ]
    if not found.is_better:
        lines.append(f"{file} stays as it is: nothing did surely better")
    elif not write:
        lines.append("Next:  forecart tune --write puts them into the settings file")
    else:
        text = write_settings(file.read_text(), "train", found.best)
        parse_params(yaml.safe_load(text), str(file))
        write_text(file, text)
        lines.append(f"Written to {file}. Next: dvc repro")
    return "\n".join(lines)
