"""Registering, promoting and rolling back models in the MLflow registry.

The alias ``champion`` in the registry decides which model serves: setting it is one write, and
everything that has to be known about the new champion is in the registry before it, and its files
are here. champion.json and the list of past champions follow from it; a process that is killed in
between leaves them behind the alias, and the next act brings them up to date. Whoever reads a
digest in champion.json finds the files beside it: they are fetched before it is written. Acts that
move the alias or write the file hold a lock, and a promotion compares the champion that serves with
the one that the verdict compared with: of two promoters at once one wins, and the other is told so.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import UserError
from pipelines.io import digest_directory, digest_file, read_json
from pipelines.registry.champion import (
    ANEW,
    CHAMPION_FILE,
    DIGEST_TAG,
    EVIDENCE,
    GOLDEN,
    LOCK_TAG,
    MODEL,
    VERDICT_TAG,
    Champion,
    check_files,
    describe,
    fetch_version,
    find_version,
    keep_golden,
    locate_golden,
    read_champion,
    read_digest,
    write_champion,
)
from pipelines.registry.connection import name_registry, open_registry, read_name
from pipelines.registry.lock import hold_lock
from pipelines.registry.tracking import log_quality, track, upload_model
from pipelines.registry.verdict import VERDICT, read_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

FEATURES: Final = Path("data/features")
LOCK: Final = Path("dvc.lock")
CANDIDATE_ALIAS: Final = "candidate"
CHAMPION_ALIAS: Final = "champion"

# Tag of the registered model: versions that were champion, in order, the present one last.
HISTORY_TAG: Final = "forecart.champions"
_HISTORY_LENGTH: Final = 100


def register(root: Path) -> str:
    """Put the trained model into the registry as candidate.

    A model is known by the digest of its files: registering it again finds its version.

    Args:
        root: the project's folder.

    Returns:
        What was done, for people.

    Raises:
        UserError: there is no model, or it holds files that are neither weights nor JSON.
    """
    registry, _ = open_registry(root)
    version, new = _register(registry, root, _digest_model(root))
    log_quality(registry, root, read_digest(version))
    state = "registered" if new else "was registered already"
    return f"{_name(version)} {state} as candidate ({_short(read_digest(version))})"


def promote(root: Path) -> str:
    """Make the candidate champion.

    Args:
        root: the project's folder.

    Returns:
        What was done, for people.

    Raises:
        UserError: the verdict is missing, did not pass, or is about another model, or another
            champion than the one it was compared with serves by now, or somebody else is
            promoting, or the model or its verdict changed meanwhile. The champion is then the one
            that it was.
    """
    registry, name = open_registry(root)
    with hold_lock(str(registry.tracking_uri), name, root):
        return _promote(registry, root)


def _promote(registry: MlflowClient, root: Path) -> str:
    present = _catch_up(registry, root)
    digest = _digest_model(root)
    if present is not None and read_digest(present) == digest:
        _secure(registry, present, root)
        write_champion(root, describe(present))
        return f"{_name(present)} is champion already ({_short(digest)})"
    # Before the verdict is read: whatever is written from here on is found.
    judged = {MODEL: digest, **{path: _digest(root / path) for path in (VERDICT, LOCK)}}
    verdict = _find_verdict(root, digest)
    serving = None if present is None else read_digest(present)
    if verdict["champion"] != serving:
        raise UserError(
            f"{root / VERDICT}: compares with champion {_short(verdict['champion'])}, but "
            f"{_short(serving)} serves by now; run: dvc repro"
        )
    version, _ = _register(registry, root, digest)
    _secure(registry, version, root)
    log_quality(registry, root, digest)
    history = _read_history(registry, version.name, present)
    # Until the alias moves, nobody takes these into account.
    _log_evidence(registry, version, root, judged)
    _write_history(registry, version.name, [*history, int(version.version)])
    registry.set_registered_model_alias(version.name, CHAMPION_ALIAS, version.version)
    # With the tags that it has by now.
    _publish(registry, registry.get_model_version(version.name, version.version), root)
    before = "the first champion" if present is None else f"instead of version {present.version}"
    return f"{_name(version)} is champion, {before} ({_short(digest)}); next: forecart serve"


def rollback(root: Path) -> str:
    """Return to the previous champion.

    Args:
        root: the project's folder.

    Returns:
        What was done, for people.

    Raises:
        UserError: there is no champion, or none before it, or its files cannot be had. The
            champion is then the one that it was.
    """
    registry, name = open_registry(root)
    with hold_lock(str(registry.tracking_uri), name, root):
        return _roll_back(registry, root)


def _roll_back(registry: MlflowClient, root: Path) -> str:
    present = _catch_up(registry, root)
    if present is None:
        raise UserError("there is no champion to roll back")
    history = _read_history(registry, present.name, present)
    if len(history) < 2:
        raise UserError(f"{_name(present)} is the first champion; there is none before it")
    previous = _find_number(registry, present.name, history[-2])
    fetch_version(registry, previous, root)
    registry.set_registered_model_alias(previous.name, CHAMPION_ALIAS, previous.version)
    _write_history(registry, present.name, history[:-1])
    _publish(registry, previous, root)
    return (
        f"{_name(previous)} is champion again, instead of version {present.version} "
        f"({_short(read_digest(previous))})"
    )


def status(root: Path) -> str:
    """Show versions, candidate, champion and verdict as a table; champion.json follows the alias.

    Args:
        root: the project's folder.

    Raises:
        UserError: the champion's files cannot be had, or champion.json names one of another
            registry.
    """
    registry, name = open_registry(root)
    present = _find_champion(registry, root)
    if present is not None:
        fetch_version(registry, present, root)
    if (
        not (root / CHAMPION_FILE).exists()
        if present is None
        else read_champion(root) != describe(present)
    ):
        # Somebody may have moved the alias and written the file meanwhile.
        with hold_lock(str(registry.tracking_uri), name, root):
            present = _find_champion(registry, root)
            if present is not None:
                _publish(registry, present, root)
            else:
                # The graph reads it also where it says that there is none.
                write_champion(root, Champion())
    versions = sorted(
        registry.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version)
    )
    if not versions:
        return (
            f"no model is registered as {name}; next: forecart promote, where forecart summary "
            "says that the trained one passed"
        )
    history = _read_history(registry, name, present)
    aliases = registry.get_registered_model(name).aliases
    rows = [("version", "model", "role", "verdict")]
    for version in versions:
        number = int(version.version)
        roles = [alias for alias, of in sorted(aliases.items()) if int(of) == number]
        if number in history[:-1]:
            roles.append(f"champion before ({history[:-1].index(number) + 1})")
        rows.append(
            (
                str(number),
                _short(version.tags.get(DIGEST_TAG)),
                ", ".join(roles) or "-",
                _short(version.tags.get(VERDICT_TAG)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{name} in {name_registry(registry)}", *table])


def _register(registry: MlflowClient, root: Path, digest: str) -> tuple[ModelVersion, bool]:
    """Return the version of the trained model, which has a digest, and whether it is new."""
    from mlflow.exceptions import MlflowException

    name = read_name(root)
    version = find_version(registry, name, digest)
    new = version is None
    if version is None:
        if not _find_models(registry, digest):
            _log_model(root, digest)
        model = _find_models(registry, digest)[0]
        try:
            registry.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = registry.create_model_version(
            name,
            source=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            tags={DIGEST_TAG: digest},
        )
    registry.set_registered_model_alias(name, CANDIDATE_ALIAS, version.version)
    return version, new


def _log_evidence(
    registry: MlflowClient, version: ModelVersion, root: Path, judged: Mapping[Path, str | None]
) -> None:
    """Keep what the promotion relies on beside the run, where `forecart verify` finds it.

    Args:
        registry: that knows the version.
        version: that is to be champion.
        root: the project's folder.
        judged: digests of the model, the verdict and dvc.lock as they were judged; None for one
            that was not there.

    Raises:
        UserError: one of them has changed since.
    """
    digest = read_digest(version)
    with tempfile.TemporaryDirectory(prefix="forecart-") as temporary:
        folder = Path(temporary)
        # Copies: the files themselves may be written until they are logged.
        for path, expected in judged.items():
            found = root / path
            if path != MODEL:
                found = folder / path.name
                with suppress(FileNotFoundError):
                    shutil.copyfile(root / path, found)
            if _digest(found) != expected:
                raise UserError(f"{root / path}: changed meanwhile; try again")
        if keep_golden(root, digest) is not None:
            shutil.copyfile(locate_golden(root, digest), folder / GOLDEN)
        if version.run_id:
            for file in sorted(folder.iterdir()):
                place = f"{EVIDENCE}-{version.version}"
                registry.log_artifact(version.run_id, str(file), place)
    for tag, path in ((LOCK_TAG, LOCK), (VERDICT_TAG, VERDICT)):
        if (known := judged[path]) is not None:
            registry.set_model_version_tag(version.name, version.version, tag, known)


def _find_models(registry: MlflowClient, digest: str) -> list[LoggedModel]:
    """Return the models with a digest that runs have logged, the newest run's first."""
    runs = registry.search_runs(
        [experiment.experiment_id for experiment in registry.search_experiments()],
        f"tags.`{DIGEST_TAG}` = '{digest}'",
        order_by=["attributes.start_time DESC"],
    )
    outputs = [registry.get_run(run.info.run_id).outputs for run in runs]
    return [
        registry.get_logged_model(model.model_id)
        for output in outputs
        if output is not None
        for model in output.model_outputs
    ]


def _log_model(root: Path, digest: str) -> None:
    """Log a model that came from DVC's cache, so that no run of this registry trained it."""
    data = digest_directory(root / FEATURES)
    with track(root, params={}, data_digest=data, name="restored") as run:
        run.log_model(root / MODEL, digest, _list_outputs(root))


def _list_outputs(root: Path) -> list[str]:
    """Return the columns that the trained model predicts."""
    return [target["name"] for target in read_json(root / MODEL / "config.json")["targets"]]


def _find_champion(registry: MlflowClient, root: Path) -> ModelVersion | None:
    """Return the version that the alias names.

    Raises:
        UserError: there is none, but champion.json names a champion: of another registry, or one
            that somebody took the alias from.
    """
    from mlflow.exceptions import MlflowException

    try:
        return registry.get_model_version_by_alias(read_name(root), CHAMPION_ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    known = read_champion(root)
    # The file was written for another registry, or somebody took the alias away. It is not this
    # one's to overwrite.
    if known.digest is not None:
        file, name, where = root / CHAMPION_FILE, read_name(root), name_registry(registry)
        version = find_version(registry, name, known.digest)
        if version is not None:
            raise UserError(
                f"{file}: names champion {_short(known.digest)}, but nothing is champion any more "
                f"in the registry {where}; give the alias {CHAMPION_ALIAS} back to "
                f"version {version.version} of {name} there, in MLflow's pages; or, to begin "
                f"without a champion, {ANEW}"
            )
        raise UserError(
            f"{file}: names champion {_short(known.digest)}, which the registry "
            f"{where} does not know; set MLFLOW_TRACKING_URI to the registry that "
            f"does; where it was deleted, give the alias {CHAMPION_ALIAS} to another version of "
            f"{name} there, in MLflow's pages; or, to begin without a champion, {ANEW}"
        )
    return None


def _catch_up(registry: MlflowClient, root: Path) -> ModelVersion | None:
    """Return the champion, and complete what a killed act has left.

    Whoever replaces a champion whose files are lost does not need them, so that they are not
    told here.
    """
    present = _find_champion(registry, root)
    if present is None:
        write_champion(root, Champion())
    elif read_champion(root) != describe(present):
        try:
            fetch_version(registry, present, root)
        except UserError:
            return present
        write_champion(root, describe(present))
    return present


def _publish(registry: MlflowClient, version: ModelVersion, root: Path) -> None:
    """Write champion.json, the champion's files first: a service that watches it takes them."""
    fetch_version(registry, version, root)
    write_champion(root, describe(version))


def _secure(registry: MlflowClient, version: ModelVersion, root: Path) -> None:
    """Fetch the version of the trained model; where the registry lost its files it gets them anew.

    Raises:
        UserError: they cannot be had even so.
    """
    from mlflow.exceptions import MlflowException

    try:
        fetch_version(registry, version, root)
    except UserError as lost:
        logged = _find_models(registry, read_digest(version))
        models = [model for model in logged if model.artifact_location == version.source]
        if not models:
            raise
        try:
            upload_model(
                registry, models[0], root / MODEL, read_digest(version), _list_outputs(root)
            )
        except (MlflowException, OSError):
            raise lost from None
        fetch_version(registry, version, root)


def _find_number(registry: MlflowClient, name: str, number: int) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return registry.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"{name} version {number}, the champion before, is not in the registry any more"
        ) from None


def _read_history(registry: MlflowClient, name: str, present: ModelVersion | None) -> list[int]:
    """Return the versions that were champion, the present one last.

    Entries after the present champion belong to an act that was killed before it moved the alias
    (promotion) or after it did (rollback); neither counts.
    """
    if present is None:
        return []
    number = int(present.version)
    history: list[int] = json.loads(registry.get_registered_model(name).tags.get(HISTORY_TAG, "[]"))
    while history and history[-1] != number:
        history.pop()
    return history or [number]


def _write_history(registry: MlflowClient, name: str, history: list[int]) -> None:
    registry.set_registered_model_tag(name, HISTORY_TAG, json.dumps(history[-_HISTORY_LENGTH:]))


def _digest_model(root: Path) -> str:
    folder = root / MODEL
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run: dvc repro")
    check_files(folder)
    return digest_directory(folder)


def _digest(path: Path) -> str | None:
    """Return the digest of a file or folder; None where it is not there, or goes meanwhile."""
    try:
        return digest_directory(path) if path.is_dir() else digest_file(path)
    except (FileNotFoundError, UserError):
        return None


def _find_verdict(root: Path, digest: str) -> dict[str, Any]:
    """Return the verdict about a model.

    Raises:
        UserError: it is about another model, or it did not pass, or it is not as the gate wrote it.
    """
    path = root / VERDICT
    verdict = read_verdict(path)
    if verdict["candidate"] != digest:
        raise UserError(
            f"{path}: is about model {_short(verdict['candidate'])}, not about "
            f"{_short(digest)} in {root / MODEL}; run: dvc repro"
        )
    if not verdict["passed"]:
        failed = "; ".join(c["why"] for c in verdict["checks"] if not c["passed"])
        raise UserError(f"{path}: the candidate did not pass: {failed or 'no check is recorded'}")
    return verdict


def _name(version: ModelVersion) -> str:
    return f"{version.name} version {version.version}"


def _short(digest: str | None) -> str:
    return "-" if digest is None else digest.removeprefix("sha256:")[:12]
