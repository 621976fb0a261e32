"""The champion: which model serves, told by a tracked file, and where its files are.

champion.json is an input of the graph, so that every stage stays a pure function of files. It is
derived from the registry's alias, which is what decides.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines.address import REGISTRY, lacks_registry
from pipelines.errors import UserError
from pipelines.io import digest_directory, is_digest, read_json, replace_directory, write_json
from pipelines.registry.connection import connect, hold_alone, name_registry, read_name, tell

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION_FILE: Final = Path("champion.json")
MODEL: Final = Path("models/gpt")
CACHE: Final = Path(".forecart") / "models"
# What to do about a file that says nothing true: it follows from the registry.
ANEW: Final = "delete the file and run: forecart status"
DIGEST_TAG: Final = "forecart.model_digest"
VERDICT_TAG: Final = "forecart.verdict"
LOCK_TAG: Final = "forecart.dvc_lock"

# What a promotion keeps beside the run: the folder's name begins so.
EVIDENCE: Final = "promotion"
GOLDEN: Final = "golden.json"

# A model's files are data that nothing executes; any other kind is refused unread.
SAFE_SUFFIXES: Final = frozenset({".safetensors", ".json"})

_BENTO: Final = Path("build/bento/src")

_WEIGHTS: Final = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """Content of champion.json; all None while there is no champion.

    Attributes:
        digest: of the model's files.
        version: in the registry.
        verdict: digest of the verdict that it was promoted with.
    """

    digest: str | None = None
    version: int | None = None
    verdict: str | None = None


def read_champion(root: Path) -> Champion:
    """Read champion.json; a missing file says that there is no champion.

    Raises:
        UserError: the file does not hold what it should.
    """
    path = root / CHAMPION_FILE
    if not path.exists():
        return Champion()
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {ANEW}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid JSON; {ANEW}") from None
    keys = set(asdict(Champion()))
    if not isinstance(content, dict) or set(content) != keys:
        raise UserError(f"{path}: expected exactly the keys {', '.join(sorted(keys))}; {ANEW}")
    champion = Champion(**content)
    valid = {
        "digest": is_digest(champion.digest),
        # True is an int to Python.
        "version": type(champion.version) is int,
        "verdict": isinstance(champion.verdict, str),
    }
    for key, right in valid.items():
        if content[key] is not None and not right:
            raise UserError(f"{path}: {key} {content[key]!r} is none; {ANEW}")
    return champion


def write_champion(root: Path, champion: Champion) -> None:
    """Write champion.json if it says something else."""
    path = root / CHAMPION_FILE
    if not path.exists() or read_json(path) != asdict(champion):
        write_json(path, asdict(champion))


def fetch_champion(root: Path) -> Path | None:
    """Return a folder with the champion's files, or None where there is no champion.

    The files come from the registry once and are kept; every call compares them with the digest.
    Where the trained model is the champion itself, no registry is needed.

    Raises:
        UserError: the registry does not hold the model, or its files are not those promoted.
    """
    champion = read_champion(root)
    if champion.digest is None:
        return None
    target = locate_fetched(root, champion.digest)
    if _holds(target, champion.digest):
        return target
    if _holds(root / MODEL, champion.digest):
        return _take_trained(root, champion.digest)
    if lacks_registry(root):
        raise UserError(
            f"{root / CHAMPION_FILE}: its registry, {REGISTRY}, is not here; run in the project's "
            "folder, or set MLFLOW_TRACKING_URI to the registry that holds the model; to begin "
            f"without a champion, {ANEW}"
        )
    registry = connect(root)
    version = find_version(registry, read_name(root), champion.digest)
    if version is None:
        raise UserError(
            f"{root / CHAMPION_FILE}: the registry {name_registry(registry)} does not hold this "
            "model; where it is the right registry, run: forecart status, which writes the file "
            "anew; else set MLFLOW_TRACKING_URI to the registry that does"
        )
    return fetch_version(registry, version, root)


def fetch_version(registry: MlflowClient, version: ModelVersion, root: Path) -> Path:
    """Return a folder with the files of a version, fetched once and compared at every call.

    Of several that want one at once the first fetches it, and the others wait.

    Raises:
        UserError: the files cannot be had, or are not those registered.
    """
    digest = read_digest(version)
    target = locate_fetched(root, digest)
    if _holds(target, digest):
        return target
    with hold_alone(target.with_name(f"{target.name}.lock")):
        if _holds(target, digest):
            return target
        golden = locate_golden(root, digest)
        if not golden.is_file():
            _fetch_golden(registry, version, golden)
        with downloaded(registry, version) as folder, replace_directory(target) as partial:
            shutil.copytree(locate_files(folder), partial, dirs_exist_ok=True)
            found = digest_directory(partial)
            if found != digest:
                raise UserError(
                    f"version {version.version} of {version.name} in the registry has changed: "
                    f"its files are {found}, not {digest}"
                )
    return target


def _take_trained(root: Path, digest: str) -> Path:
    """Keep the trained model as the champion that it is, with what it has to reproduce."""
    target = locate_fetched(root, digest)
    with hold_alone(target.with_name(f"{target.name}.lock")):
        if not _holds(target, digest):
            keep_golden(root, digest)
            with replace_directory(target) as partial:
                shutil.copytree(root / MODEL, partial, dirs_exist_ok=True)
                check_files(partial)
                if digest_directory(partial) != digest:
                    raise UserError(f"{root / MODEL}: changed while it was read; try again")
    return target


def locate_fetched(root: Path, digest: str) -> Path:
    """Return where the files of a fetched model are kept."""
    return root / CACHE / digest.removeprefix("sha256:")


def _holds(folder: Path, digest: str) -> bool:
    return folder.is_dir() and digest_directory(folder) == digest


def locate_golden(root: Path, digest: str) -> Path:
    """Return where the golden predictions of a champion are kept, beside its files."""
    fetched = locate_fetched(root, digest)
    return fetched.with_name(f"{fetched.name}.{GOLDEN}")


def keep_golden(root: Path, digest: str) -> Path | None:
    """Keep what the packaged model has to reproduce; a service that takes it tries that first."""
    packaged = root / _BENTO / GOLDEN
    if not packaged.is_file():
        return None
    golden = read_json(packaged)
    if golden["model"] != digest:
        return None
    write_json(locate_golden(root, digest), golden)
    return packaged


def _fetch_golden(registry: MlflowClient, version: ModelVersion, target: Path) -> None:
    """Fetch the golden predictions that a promotion kept; older ones kept none."""
    from mlflow.artifacts import download_artifacts

    place = f"{EVIDENCE}-{version.version}"
    path = f"{place}/{GOLDEN}"
    with tempfile.TemporaryDirectory(prefix="forecart-") as folder:
        with _reaching(registry, version):
            kept = registry.list_artifacts(version.run_id, place) if version.run_id else []
            if path not in [file.path for file in kept]:
                return
            found = download_artifacts(
                run_id=version.run_id,
                artifact_path=path,
                dst_path=folder,
                tracking_uri=registry.tracking_uri,
            )
        write_json(target, read_json(Path(found)))


def find_version(registry: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    """Return the first version of a model with a digest."""
    filter_ = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    found = registry.search_model_versions(filter_)
    return min(found, key=lambda v: int(v.version), default=None)


@contextmanager
def downloaded(registry: MlflowClient, version: ModelVersion) -> Iterator[Path]:
    """Give a folder with the artifacts of a version, as long as the block lasts.

    Raises:
        UserError: they cannot be had.
    """
    from mlflow.artifacts import download_artifacts

    # MLflow never removes the folder that it makes when it is given none.
    with tempfile.TemporaryDirectory(prefix="forecart-") as folder:
        with _reaching(registry, version):
            uri = registry.get_model_version_download_uri(version.name, version.version)
            found = download_artifacts(
                artifact_uri=uri, tracking_uri=registry.tracking_uri, dst_path=folder
            )
        yield Path(found)


@contextmanager
def _reaching(registry: MlflowClient, version: ModelVersion) -> Iterator[None]:
    """Tell in one line that files of a version cannot be had."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the registry {name_registry(registry)} cannot give the files of version "
            f"{version.version} of {version.name}: {tell(error)}"
        ) from None


def locate_files(folder: Path) -> Path:
    """Return the folder of the model's own files inside an MLflow model.

    Raises:
        UserError: there is none, or one that holds files of another kind than weights and JSON.
    """
    found = sorted(folder.rglob(_WEIGHTS))
    if len(found) != 1:
        raise UserError(f"{folder}: expected one {_WEIGHTS}, found {len(found)}")
    check_files(found[0].parent)
    return found[0].parent


def check_files(folder: Path) -> None:
    """Refuse a model that holds anything but weights and JSON.

    Raises:
        UserError: naming the file.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or (path.is_file() and path.suffix not in SAFE_SUFFIXES):
            raise UserError(
                f"{path}: a model holds {' and '.join(sorted(SAFE_SUFFIXES))} files only"
            )


def read_digest(version: ModelVersion) -> str:
    """Return the digest that a version was registered with.

    Raises:
        UserError: it has none: somebody else made the version.
    """
    digest = version.tags.get(DIGEST_TAG)
    if digest is None:
        raise UserError(
            f"version {version.version} of {version.name} was not made by forecart register; "
            "give the alias back to one that was"
        )
    return str(digest)


def describe(version: ModelVersion) -> Champion:
    """Return what champion.json says of a version."""
    return Champion(
        digest=read_digest(version),
        version=int(version.version),
        verdict=version.tags.get(VERDICT_TAG),
    )
