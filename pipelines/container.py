"""`forecart containerize`: build/bento -> a lean image, by whichever builder is there.

The recipe is deploy/container/Containerfile. pip's configuration of this machine (indexes, folders
of wheels, certificates) serves the build as a secret and as read-only mounts, and stays out of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from pipelines.config import Builder
from pipelines.errors import UserError
from pipelines.io import digest_directory
from pipelines.registry.champion import read_champion
from pipelines.registry.verdict import VERDICT, read_verdict

BENTO: Final = Path("build/bento")
RECIPE: Final = Path("deploy/container")
MODEL_LABEL: Final = "forecart.model"

# pip options that reach an index, and that therefore have to reach the build.
_PIP_OPTIONS: Final = (
    "index-url",
    "extra-index-url",
    "find-links",
    "cert",
    "trusted-host",
    "proxy",
    "timeout",
)

# podman and buildah copy themselves into sealed memory before a step runs. The kernel refuses the
# seal while it still holds one of the pages, as it may for a moment where memory is scarce.
_PASSING: Final = "sealing memfd copy: Device or resource busy"


@dataclass(frozen=True, kw_only=True)
class PipConfig:
    """What pip on this machine is told.

    Attributes:
        options: names without dashes and their values, one or several separated by blanks.
        paths: local files and folders among them.
    """

    options: dict[str, str]
    paths: list[Path]

    def to_text(self) -> str:
        """Return the content of a pip.conf."""
        return "[global]\n" + "".join(f"{k} = {v}\n" for k, v in sorted(self.options.items()))


def containerize(
    root: Path,
    *,
    tag: str,
    base_image: str,
    builder: Builder,
    torch_index: str,
) -> str:
    """Build the image of the packaged service.

    Args:
        root: the project's folder.
        tag: name of the image.
        base_image: a Linux with the Python that the Bento was built for, as python3.
        builder: the program that builds.
        torch_index: where the CPU build of PyTorch is; empty: pip's configuration suffices.

    Returns:
        What was done, for people.

    Raises:
        UserError: there is no Bento, no builder, or the build fails.
    """
    description = root / BENTO / "bento.yaml"
    if not description.is_file():
        raise UserError(f"{root / BENTO}: no Bento; run: dvc repro")
    program = find_builder(builder)
    bento = yaml.safe_load(description.read_text(encoding="utf-8"))
    pip = read_pip_config()
    if program is Builder.DOCKER and any(path.is_dir() for path in pip.paths):
        folders = ", ".join(str(path) for path in pip.paths if path.is_dir())
        raise UserError(
            f"pip takes packages from {folders}, which docker cannot mount while it builds; "
            "use podman or buildah, or an index that is reached over the network"
        )
    labels = make_labels(bento, digest_directory(root / BENTO), base_image)
    standing = tell_standing(root, labels[MODEL_LABEL])
    with tempfile.TemporaryDirectory(prefix="forecart-") as temporary:
        context, secret = Path(temporary) / "context", Path(temporary) / "pip.conf"
        shutil.copytree(root / RECIPE, context)
        shutil.copytree(root / BENTO, context / "bento")
        shutil.copy(root / BENTO / "env/python/requirements.txt", context / "requirements.txt")
        secret.write_text(pip.to_text(), encoding="utf-8")
        command = plan_build(
            program,
            context=context,
            tag=tag,
            arguments={"BASE_IMAGE": base_image, "TORCH_INDEX": torch_index},
            labels=labels,
            secret=secret,
            mounts=pip.paths,
        )
        result = _build(command)
    if result.returncode != 0:
        raise UserError(f"{program} could not build the image:\n{result.stdout.strip()[-3000:]}")
    size = read_size(program, tag)
    return (
        f"{tag} built by {program} from {bento['name']}:{bento['version']}, "
        f"{size / 1e6:,.0f} MB{standing}; "
        "next: run it with --read-only --tmpfs /tmp -p 127.0.0.1:3000:3000"
    )


def tell_standing(root: Path, model: str) -> str:
    """Return what has to be known of a packaged model that is not the champion.

    Args:
        root: the project's folder.
        model: its digest.

    Raises:
        UserError: the verdict is not as the gate wrote it, or champion.json is damaged.
    """
    if read_champion(root).digest == model:
        return ""
    path = root / VERDICT
    verdict = read_verdict(path) if path.exists() else None
    if verdict is None or verdict["candidate"] != model:
        return "; not the champion, and not judged: dvc repro"
    if not verdict["passed"]:
        return f"; not the champion: the gate refused it ({VERDICT})"
    return "; not the champion: forecart promote makes it that"


def _build(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the build; a moment's trouble of the machine, which says nothing about it, twice more."""
    for tries_left in reversed(range(3)):
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=os.environ | {"DOCKER_BUILDKIT": "1"},
        )
        if result.returncode == 0 or _PASSING not in result.stdout or not tries_left:
            break
    return result


def find_builder(wanted: Builder) -> Builder:
    """Return the builder that is wanted, or the first that is installed.

    Raises:
        UserError: it is not there.
    """
    names = [b for b in Builder if b is not Builder.AUTO] if wanted is Builder.AUTO else [wanted]
    for name in names:
        if shutil.which(name) and _answers(name):
            return name
    raise UserError(f"no image can be built here: install {' or '.join(names)}")


def _answers(name: Builder) -> bool:
    """A docker client without an engine builds nothing."""
    command = {"docker": ["docker", "info"]}.get(name, [str(name), "--version"])
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def read_pip_config() -> PipConfig:
    """Ask pip for its configuration, files and environment alike."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return parse_pip_config(found)


def parse_pip_config(listed: str) -> PipConfig:
    """Read the lines of `pip config list`; what comes later wins, as with pip."""
    options: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, quoted = line.partition("=")
        name = key.rpartition(".")[2]
        if name in _PIP_OPTIONS:
            value = quoted.strip().strip("'\"").replace("\\n", " ")
            options[name] = " ".join(value.split())
    paths = []
    for value in options.values():
        for word in value.split():
            # An index in a folder links to the packages in a folder beside it.
            path = Path(urlsplit(word).path).parent if word.startswith("file:") else Path(word)
            if path.is_absolute() and path.exists():
                paths.append(path)
    return PipConfig(options=options, paths=paths)


def make_labels(bento: dict[str, Any], digest: str, base_image: str) -> dict[str, str]:
    """Return the image's labels: what is in it, by digest."""
    return {
        "org.opencontainers.image.title": str(bento["name"]),
        "org.opencontainers.image.version": str(bento["version"]),
        "org.opencontainers.image.base.name": base_image,
        MODEL_LABEL: str(bento["labels"]["model"]),
        "forecart.bento": digest,
    }


def plan_build(
    program: Builder,
    *,
    context: Path,
    tag: str,
    arguments: dict[str, str],
    labels: dict[str, str],
    secret: Path,
    mounts: list[Path],
) -> list[str]:
    """Return the argument list of the build."""
    command = [str(program), "build", "--file", str(context / "Containerfile"), "--tag", tag]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for name, value in labels.items():
        command += ["--label", f"{name}={value}"]
    command += ["--secret", f"id=pip,src={secret}"]
    if program is not Builder.DOCKER:
        for path in mounts:
            command += ["--volume", f"{path}:{path}:ro"]
    return [*command, str(context)]


def read_size(program: Builder, tag: str) -> int:
    """Return an image's size in bytes, as the builder tells it."""
    verb = ["images", "--json"] if program is Builder.BUILDAH else ["image", "inspect"]
    answer = subprocess.run([str(program), *verb, tag], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)[0]
    size = found.get("Size", found.get("size"))
    if isinstance(size, str):  # buildah's is for people
        number, _, unit = size.partition(" ")
        return int(float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit])
    return int(size)
