"""Stage package: the model, what serves it and what it needs -> build/bento, measured.

The Bento is built and checked by processes of their own, as BentoML keeps global state and as
only a fresh process shows that the Bento holds all it needs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.config import Params
from pipelines.errors import UserError
from pipelines.events import to_us
from pipelines.io import digest_directory, read_json, replace_directory, write_json, write_text
from pipelines.registry.champion import check_files

if TYPE_CHECKING:
    from pipelines.features.store import Sequences

MODEL: Final = Path("models/gpt")
FEATURES: Final = Path("data/features")
BENTO: Final = Path("build/bento")
REPORT: Final = Path("reports/package.json")

# What a prediction runs; the check of the golden predictions fails if something is missing.
SOURCES: Final = (
    "pipelines/__init__.py",
    "pipelines/address.py",
    "pipelines/config.py",
    "pipelines/errors.py",
    "pipelines/events.py",
    "pipelines/io.py",
    "pipelines/features/__init__.py",
    "pipelines/features/store.py",
    "pipelines/model",
    "serving",
)
SERVICE: Final = "serving.service:Forecart"
EXTRA: Final = "serve"

# Golden histories are cut to so many events, so that one busy shopper does not bloat the Bento.
_GOLDEN_EVENTS: Final = 500

# BentoML stamps the time of building; equal inputs have to give equal bytes.
_EPOCH: Final = "1970-01-01T00:00:00+00:00"


def run(params: Params, root: Path = Path()) -> str:
    """Build the Bento, check its golden predictions, measure it and put it in place.

    Args:
        params: the ``package`` section and ``gate.max_latency_ms`` are read.
        root: the project's folder.

    Raises:
        UserError: an input is missing, or a pin is.
        RuntimeError: BentoML fails, or the Bento does not reproduce the golden predictions.
    """
    check_files(root / MODEL)
    digest = digest_directory(root / MODEL)
    requirements = pin_requirements(root)
    with tempfile.TemporaryDirectory(prefix="forecart-") as temporary:
        source, home = Path(temporary) / "source", Path(temporary) / "home"
        for name in SOURCES:
            _copy(root / name, source / name)
        _copy(root / MODEL, source / "model")
        users = params.package.golden_users
        write_json(source / "golden.json", make_golden(root, digest, users=users))
        write_text(source / "requirements.txt", "".join(f"{r}\n" for r in requirements))
        bentofile = plan_bento(params.package.name, digest)
        write_text(source / "bentofile.yaml", yaml.safe_dump(bentofile, sort_keys=True))
        version = digest.removeprefix("sha256:")[:12]
        _run(
            ["bentoml", "build", str(source), "--version", version, "--output", "tag"],
            folder=source,
            environment={"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"},
        )
        with replace_directory(root / BENTO) as partial:
            built = home / "bentos" / params.package.name / version
            shutil.copytree(built, partial, dirs_exist_ok=True)
            _normalise(partial)
            times = json.loads(_run(["serving.measure"], folder=partial / "src", environment={}))
    size = sum(p.stat().st_size for p in (root / BENTO).rglob("*") if p.is_file()) / 1e6
    limit = params.gate.max_latency_ms
    write_json(root / REPORT, describe(digest, size, times["p99_ms"], limit))
    return (
        f"built {params.package.name}:{version} ({size:.1f} MB), golden predictions of {users} "
        f"histories reproduced, one shopper takes {times['p50_ms']:.1f} ms (99th percentile "
        f"{times['p99_ms']:.1f} ms); see {root / BENTO}"
    )


def describe(digest: str, size_mb: float, p99_ms: float, limit_ms: float) -> dict[str, Any]:
    """Return reports/package.json.

    Two measurements differ where equal inputs have to give equal bytes, so the time is told as a
    bound: the next of 100, 200, 500, 1000 ... ms, or the limit if that is nearer.

    Args:
        digest: of the model.
        size_mb: of the Bento without the packages that it installs.
        p99_ms: 99th percentile of the time for one shopper.
        limit_ms: what the gate allows.
    """
    steps = [*(m * 10.0**k for k in range(2, 8) for m in (1, 2, 5)), limit_ms]
    bound = min(step for step in steps if step >= p99_ms)
    return {"model": digest, "size_mb": round(size_mb, 2), "p99_at_most_ms": bound}


def plan_bento(name: str, digest: str) -> dict[str, Any]:
    """Return the content of bentofile.yaml."""
    return {
        "service": SERVICE,
        "name": name,
        "description": "Predicts from recent events what every shopper does next. "
        "POST /predict; the API is described at /docs.json.",
        "labels": {"model": digest},
        "include": ["*"],
        "exclude": ["__pycache__/", "*.pyc"],
        "python": {"requirements_txt": "requirements.txt", "lock_packages": False},
        "docker": {"python_version": f"{sys.version_info.major}.{sys.version_info.minor}"},
        "envs": [{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
    }


def pin_requirements(root: Path) -> list[str]:
    """Return name==version of what the serve extra needs, directly or not.

    The names come from the metadata of the installed distributions, the versions from
    constraints.txt. What is not pinned there is left to the installer (the CUDA libraries, which
    follow the build of torch), and so is BentoML, which adds itself.

    Args:
        root: holds pyproject.toml and constraints.txt.

    Raises:
        UserError: a file or a pin is missing.
    """
    pins = _read_pins(root / "constraints.txt")
    path = root / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        needs = [Requirement(text) for text in project["optional-dependencies"][EXTRA]]
    except (FileNotFoundError, KeyError, tomllib.TOMLDecodeError):
        raise UserError(f"{path}: no optional dependencies named {EXTRA}") from None
    waiting = [need for need in needs if need.marker is None or need.marker.evaluate()]
    for requirement in waiting:
        if canonicalize_name(requirement.name) not in pins:
            raise UserError(f"{root / 'constraints.txt'}: {requirement.name} is not pinned")
    needed: set[str] = set()
    # A distribution is visited once for every set of its extras that is asked for.
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name not in pins or (name, extras) in seen:
            continue
        seen.add((name, extras))
        needed.add(name)
        for text in _read_needs(name):
            need = Requirement(text)
            chosen = [{"extra": extra} for extra in ("", *sorted(extras))]
            if need.marker is None or any(need.marker.evaluate(c) for c in chosen):
                waiting.append(need)
    return [f"{name}=={pins[name]}" for name in sorted(needed - {"bentoml"})]


def _read_pins(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def _read_needs(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{name} is not installed; install the {EXTRA} extra") from None


def make_golden(root: Path, digest: str, *, users: int) -> dict[str, Any]:
    """Predict some histories with the model as trained.

    The package goes where the project does not, so that they are nobody's: what the chosen shoppers
    did, dealt out anew.

    Args:
        root: the project's folder.
        digest: of the model.
        users: how many, of shoppers spread evenly over all.

    Returns:
        golden.json: ``model``, ``now_us``, ``sequences`` and ``expected`` (target -> values).
    """
    import numpy as np

    from pipelines.features.store import Sequences
    from pipelines.model.predictor import Predictor

    everyone = Sequences.load(root / FEATURES / "sequences")
    chosen = np.unique(np.linspace(0, everyone.users - 1, users).astype(np.int64))
    now = _read_now(root / FEATURES / "cuts.json")
    sequences = deal_out(shorten(everyone, chosen, events=_GOLDEN_EVENTS), now_us=now)
    predicted = Predictor.load(root / MODEL).predict(
        sequences, np.full(sequences.users, now, dtype=np.int64)
    )
    return {
        "model": digest,
        "now_us": now,
        "sequences": encode_sequences(sequences),
        "expected": {name: values.tolist() for name, values in predicted.items()},
    }


def shorten(sequences: Sequences, users: Any, *, events: int) -> Sequences:
    """Return the last events of some users, with the queries that they use alone.

    Args:
        sequences: everyone.
        users: int64 (B,), rows to take.
        events: most events a user keeps.
    """
    import numpy as np

    from pipelines.features.store import Sequences, ranges

    taken = sequences.take(users)
    lengths = np.diff(taken.offsets)
    kept = np.minimum(lengths, events)
    rows = ranges(taken.offsets[1:] - kept, kept)
    columns = {
        name: getattr(taken, name)[rows]
        for name in ("ts", "type", "item", "category", "brand", "price", "quantity")
    }
    used, query = np.unique(np.concatenate([[0], taken.query[rows]]), return_inverse=True)
    sizes = np.diff(taken.query_offsets)[used]
    return Sequences(
        offsets=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
        session_start=taken.session_start[rows],
        query=query[1:].astype(np.int32),
        query_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        query_tokens=taken.query_tokens[ranges(taken.query_offsets[:-1][used], sizes)],
        age=taken.age,
        gender=taken.gender,
        region=taken.region,
        signup_ts=taken.signup_ts,
        **columns,
    )


def deal_out(sequences: Sequences, *, now_us: int) -> Sequences:
    """Return histories as long as these, of which no two facts need be of one shopper.

    Events, the gaps between them, and each field of the profiles change places, the same way every
    time; signups are told to the day.

    Args:
        sequences: B users, sorted.
        now_us: microseconds, after all events.
    """
    import numpy as np

    from pipelines.features.store import MISSING_TIME, Sequences
    from pipelines.model.timeline import DAY

    chance = np.random.default_rng(0)
    lengths = np.diff(sequences.offsets)
    last = sequences.offsets[1:][lengths > 0] - 1
    # From each event to the next of its shopper, from the last one to now.
    following = np.append(sequences.ts[1:], now_us)
    following[last] = now_us
    gaps = following - sequences.ts
    inner = np.ones(sequences.events, dtype=bool)
    inner[last] = False
    within = np.flatnonzero(inner)
    source = np.arange(sequences.events)
    source[within], source[last] = chance.permutation(within), chance.permutation(last)
    gaps = gaps[source]
    # Sums from each event to the end of its history, by those to the end of all.
    to_end = np.append(np.cumsum(gaps[::-1])[::-1], 0)
    ts = now_us - (to_end[:-1] - np.repeat(to_end[sequences.offsets[1:]], lengths))
    # A gap and whether a session began after it stay together.
    begins = np.append(sequences.session_start[1:], 1)[source]
    session_start = np.append(1, begins[:-1]).astype(np.uint8)
    session_start[sequences.offsets[:-1][lengths > 0]] = 1
    dealt = chance.permutation(sequences.events)
    signup = chance.permutation(sequences.signup_ts)
    return Sequences(
        offsets=sequences.offsets,
        ts=ts,
        session_start=session_start,
        query_offsets=sequences.query_offsets,
        query_tokens=sequences.query_tokens,
        age=chance.permutation(sequences.age),
        gender=chance.permutation(sequences.gender),
        region=chance.permutation(sequences.region),
        signup_ts=np.where(signup == MISSING_TIME, signup, signup - signup % DAY),
        **{
            name: getattr(sequences, name)[dealt]
            for name in ("type", "item", "category", "brand", "price", "quantity", "query")
        },
    )


def encode_sequences(sequences: Sequences) -> dict[str, Any]:
    """Return the JSON form of sequences: dtype and values of every column, NaN as null."""
    from dataclasses import fields

    columns: dict[str, Any] = {}
    for field in fields(sequences):
        column = getattr(sequences, field.name)
        values = [None if isinstance(v, float) and math.isnan(v) else v for v in column.tolist()]
        columns[field.name] = {"dtype": str(column.dtype), "values": values}
    return columns


def _read_now(path: Path) -> int:
    return to_us(datetime.fromisoformat(read_json(path)["end_ts"]))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        # Contents without modes: weights are often readable by their owner alone, and a container
        # runs as another user.
        shutil.copytree(
            source,
            target,
            ignore=shutil.ignore_patterns("__pycache__", "pages"),  # the pages read a project
            copy_function=shutil.copyfile,
        )
    elif source.is_file():
        shutil.copyfile(source, target)
    else:
        raise UserError(f"{source}: no such file; run in the project's folder")


def _normalise(bento: Path) -> None:
    """Replace what differs between two builds of the same inputs."""
    path = bento / "bento.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["creation_time"] = _EPOCH
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def _run(module: list[str], *, folder: Path, environment: dict[str, str]) -> str:
    """Run a Python module in a folder whose packages come first.

    Returns:
        What it printed.

    Raises:
        RuntimeError: it fails; with the end of what it wrote.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=folder,
        env=inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        output = (result.stderr or result.stdout).strip()[-2000:]
        raise RuntimeError(f"{' '.join(module[:2])} failed: {output}")
    return result.stdout
