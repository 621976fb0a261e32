"""Where a model comes from and what it became: one chain of digests, shown or computed again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from pipelines.errors import UserError
from pipelines.io import digest_directory, digest_file
from pipelines.registry.champion import (
    DIGEST_TAG,
    EVIDENCE,
    LOCK_TAG,
    MODEL,
    VERDICT_TAG,
    downloaded,
    locate_files,
    read_digest,
)
from pipelines.registry.connection import open_registry
from pipelines.registry.tracking import DATA_TAG
from pipelines.registry.verdict import read_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_FEATURES: Final = Path("data/features")
_BENTO: Final = Path("build/bento")
_COMMIT_TAG: Final = "mlflow.source.git.commit"


class State(StrEnum):
    """How a link of the chain was found."""

    OK = "ok"
    MISSING = "not here"
    WRONG = "WRONG"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link, computed again.

    Attributes:
        name: what.
        state: whether it is what the chain says.
        detail: for people.
    """

    name: str
    state: State
    detail: str


def show(root: Path, model: str | None) -> str:
    """Return the chain of a model.

    Args:
        root: the project's folder.
        model: version number, or the beginning of a digest; None = the champion.

    Raises:
        UserError: there is no such model.
    """
    registry, name = open_registry(root)
    version = find_model(registry, name, model)
    run = registry.get_run(version.run_id) if version.run_id else None
    tags = run.data.tags if run is not None else {}
    digest = read_digest(version)
    bento = _read_bento(root)
    rows = [
        ("data", tags.get(DATA_TAG, "not recorded")),
        ("code", tags.get(_COMMIT_TAG, "not recorded")),
        ("dvc.lock", version.tags.get(LOCK_TAG, "not promoted yet")),
        ("run", f"{run.info.run_name} {run.info.run_id}" if run is not None else "not recorded"),
        ("model", f"{digest} ({version.name} version {version.version})"),
        ("verdict", version.tags.get(VERDICT_TAG, "not promoted yet")),
        ("bento", _name_bento(bento) if _label(bento) == digest else "none of this model here"),
        ("image", f"label model={digest}, where forecart containerize has built one"),
    ]
    return "\n".join(f"{link:<9} {value}" for link, value in rows)


def verify(root: Path, model: str | None) -> str:
    """Compute every link of a model's chain again and compare.

    Links whose files are not on this machine are told and do not count.

    Raises:
        UserError: there is no such model, or a link is not what the chain says.
    """
    registry, name = open_registry(root)
    version = find_model(registry, name, model)
    links = list(_check_links(registry, version, root))
    lines = [f"{link.state:<9} {link.name:<9} {link.detail}" for link in links]
    if any(link.state is State.WRONG for link in links):
        raise UserError(
            f"version {version.version} of {version.name} is not what it says\n" + "\n".join(lines)
        )
    return "\n".join(lines)


def find_model(registry: MlflowClient, name: str, model: str | None) -> ModelVersion:
    """Return a version by its number, the beginning of its digest, or the champion.

    Raises:
        UserError: there is none, or several.
    """
    versions = list(registry.search_model_versions(f"name = '{name}'"))
    if model is None:
        aliases = registry.get_registered_model(name).aliases if versions else {}
        if "champion" not in aliases:
            raise UserError("there is no champion; name a version or a digest")
        model = str(aliases["champion"])
    if model.isascii() and model.isdigit() and len(model) < 12:
        found = [v for v in versions if int(v.version) == int(model)]
    else:
        start = model.removeprefix("sha256:")
        found = [
            v for v in versions if v.tags.get(DIGEST_TAG, "")[len("sha256:") :].startswith(start)
        ]
    if len(found) != 1:
        known = ", ".join(str(v.version) for v in sorted(versions, key=lambda v: int(v.version)))
        many = "several models have" if found else "no model has"
        raise UserError(f"{many} the version or digest {model!r}; versions: {known or 'none'}")
    return found[0]


def _check_links(registry: MlflowClient, version: ModelVersion, root: Path) -> Iterator[Link]:
    digest = read_digest(version)
    run = registry.get_run(version.run_id) if version.run_id else None
    data = run.data.tags.get(DATA_TAG) if run is not None else None
    yield _compare("data", data, _digest_data(root, digest))
    try:
        with downloaded(registry, version) as folder:
            files: str | None = digest_directory(locate_files(folder))
    except UserError as error:
        files = str(error)
    yield _compare("model", digest, files)
    logged = run.data.tags.get(DIGEST_TAG) if run is not None else None
    yield _compare("run", digest, logged)
    with _downloaded_evidence(registry, version) as evidence:
        for name, tag in (("dvc.lock", LOCK_TAG), ("verdict.json", VERDICT_TAG)):
            file = evidence / name
            found = digest_file(file) if file.exists() else None
            yield _compare(name.removesuffix(".json"), version.tags.get(tag), found)
        if (evidence / "verdict.json").exists():
            yield from _check_verdict(evidence / "verdict.json", digest)
    bento = _read_bento(root)
    if _label(bento) == digest:
        packed = root / _BENTO / "src/model"
        yield _compare("bento", digest, digest_directory(packed) if packed.is_dir() else None)


def _digest_data(root: Path, model: str) -> str | None:
    """Return the digest of the data that are here, or None where they are not this model's.

    They are while the trained model is this one: the next run replaces both.
    """
    features, trained = root / _FEATURES, root / MODEL
    if not features.is_dir() or not trained.is_dir() or digest_directory(trained) != model:
        return None
    return digest_directory(features)


def _check_verdict(file: Path, digest: str) -> Iterator[Link]:
    try:
        verdict = read_verdict(file)
    except UserError:
        yield Link(name="judged", state=State.WRONG, detail="not as the gate wrote it")
        return
    yield _compare("judged", digest, verdict["candidate"])
    passed = verdict["passed"]
    yield Link(
        name="passed",
        state=State.OK if passed else State.WRONG,
        detail="the gate passed it" if passed else "the gate did not pass it",
    )


def _compare(name: str, expected: str | None, found: str | None) -> Link:
    if expected is None:
        return Link(name=name, state=State.MISSING, detail="not recorded")
    if found is None:
        return Link(name=name, state=State.MISSING, detail=expected)
    if expected != found:
        return Link(name=name, state=State.WRONG, detail=f"{found}, recorded is {expected}")
    return Link(name=name, state=State.OK, detail=expected)


@contextmanager
def _downloaded_evidence(registry: MlflowClient, version: ModelVersion) -> Iterator[Path]:
    """Give a folder with what a promotion left beside the run: empty where it left nothing."""
    place = f"{EVIDENCE}-{version.version}"
    with tempfile.TemporaryDirectory(prefix="forecart-") as folder:
        known = registry.list_artifacts(version.run_id) if version.run_id else []
        if place in [f.path for f in known]:
            registry.download_artifacts(str(version.run_id), place, folder)
        yield Path(folder) / place


def _read_bento(root: Path) -> dict[str, Any]:
    path = root / _BENTO / "bento.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _label(bento: dict[str, Any]) -> Any:
    return bento.get("labels", {}).get("model")


def _name_bento(bento: dict[str, Any]) -> str:
    return f"{bento.get('name')}:{bento.get('version')} in {_BENTO}"
