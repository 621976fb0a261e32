"""The compose file holds together: names exist, nothing is open to the network, no secret is in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/compose"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
RECIPE = (FOLDER / "Containerfile").read_text()
USER = 10001
MOUNTED = "/run/secrets/airflow_passwords"
SETTING = "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"
# Opens the file as Airflow does: to append at the start, to read and write at a login.
AIRFLOW = f"""#!/bin/sh
set -eu
exec 3>>"${SETTING}"
exec 4<>"${SETTING}"
id -u
stat -c %a "${SETTING}"
cat <&4
echo "$@"
"""


def test_what_a_service_waits_for_exists_and_can_come_about() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            other = SERVICES[name]
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in other
            else:
                assert wait["condition"] == "service_completed_successfully"
                assert other["restart"] == "on-failure"


def test_volumes_and_secrets_are_declared() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).is_file()
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_what_programs_print_does_not_fill_the_disk() -> None:
    for name, service in SERVICES.items():
        options = service["logging"]["options"]
        assert int(options["max-file"]) * int(options["max-size"].removesuffix("m")) <= 200, name


def test_a_program_that_hangs_is_seen() -> None:
    for name, service in SERVICES.items():
        assert "healthcheck" in service or service["restart"] == "on-failure", name


def test_ports_are_bound_to_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_service_without_keys_is_called_by_its_own_name() -> None:
    assert SERVICES["service"]["environment"]["FORECART_HOSTS"].split(",") == ["service"]


def test_every_secret_comes_from_the_environment() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", TEXT))
    offered = dict(
        line.split("=", 1)
        for line in (FOLDER / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(offered) == wanted
    assert not any(offered.values())
    assert all(f"${{{name}:?" in TEXT for name in wanted)


def test_each_program_gets_its_own_secrets_alone() -> None:
    """What answers requests must not tell those of the others, whoever gets into it."""
    wanted: dict[str, set[str]] = {
        "postgres": {"POSTGRES_PASSWORD", "AIRFLOW_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD"},
        "mlflow": {"MLFLOW_DATABASE_PASSWORD"},
        "service": set(),
    }
    own = {"AIRFLOW_DATABASE_PASSWORD", "AIRFLOW_JWT_SECRET", "AIRFLOW_SECRET_KEY"}
    for name, service in SERVICES.items():
        found = set(re.findall(r"\$\{(\w+)", json.dumps(service)))
        assert found == wanted.get(name, own), name
        assert "${" not in json.dumps(service.get("command")), "arguments are for all to read"
    assert SERVICES["service"]["volumes"] == ["project:/project"]
    assert SERVICES["mlflow"]["volumes"] == ["artifacts:/artifacts"]
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name, service in SERVICES.items():
        if name != "postgres":
            assert service["environment"].items() >= quiet.items()
            assert (service["cap_drop"], service["init"]) == (["ALL"], True)
    registry = [
        SERVICES[name]["environment"]["MLFLOW_TRACKING_URI"] for name in ("service", "airflow")
    ]
    assert registry == ["http://mlflow:5000"] * 2


def test_the_database_is_healthy_only_once_its_roles_are_there() -> None:
    """While the scripts of a new volume run, the server answers on its socket."""
    assert "--host=127.0.0.1" in SERVICES["postgres"]["healthcheck"]["test"]


@pytest.mark.parametrize(
    ("line", "file"), [(".env.example .env", ".env"), ("keys.conf", "keys.conf")]
)
def test_files_of_secrets_are_made_for_their_owner_alone(
    tmp_path: Path, line: str, file: str
) -> None:
    readme = (FOLDER.parent / "README.md").read_text().splitlines()
    (command,) = [text for text in readme if text.startswith("(umask") and line in text]
    shutil.copy(FOLDER / ".env.example", tmp_path)
    (tmp_path / "gateway").mkdir()
    subprocess.run(["sh", "-c", f"umask 022; {command}"], cwd=tmp_path, check=True)
    (made,) = tmp_path.rglob(file)
    assert made.stat().st_mode & 0o777 == 0o600


def test_images_are_named_by_version() -> None:
    for service in SERVICES.values():
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a folder that other users may enter; those of pytest are for their owner alone."""
    found = Path(tempfile.mkdtemp(dir="/tmp"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


def start_airflow(folder: Path, mode: int, owner: int) -> list[str]:
    """Run the API server's command, with another Airflow, over a secret of this mode and owner."""
    user = USER if os.getuid() == 0 else os.getuid()
    secret, home, programs = folder / "secret.json", folder / "home", folder / "bin"
    if not secret.exists():
        home.mkdir(mode=0o700)
        programs.mkdir()
        (programs / "airflow").write_text(AIRFLOW)
        (programs / "airflow").chmod(0o755)
        secret.write_text(json.dumps({"admin": "secret"}) + "\n")
        secret.chmod(mode)
        if os.getuid() == 0:
            os.chown(home, user, user)
            os.chown(secret, owner, owner)
    service = SERVICES["airflow"]
    copy = home / PurePosixPath(service["environment"][SETTING]).name
    command = [part.replace("$$", "$").replace(MOUNTED, str(secret)) for part in service["command"]]
    run = subprocess.run(
        command,
        env={"PATH": f"{programs}:/usr/bin:/bin", SETTING: str(copy)},
        user=user if os.getuid() == 0 else None,
        group=user if os.getuid() == 0 else None,
        extra_groups=[] if os.getuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert secret.stat().st_mode & 0o777 == mode
    uid, *lines = run.stdout.splitlines()
    assert int(uid) == user
    return lines


@pytest.mark.parametrize(("mode", "owner"), [(0o644, 0), (0o600, USER), (0o400, USER)])
def test_airflow_may_write_to_its_file_of_passwords(folder: Path, mode: int, owner: int) -> None:
    said = ["600", '{"admin": "secret"}', "api-server --host 0.0.0.0 --port 8080"]
    assert start_airflow(folder, mode, owner) == said
    # The container is started again, with its old files.
    assert start_airflow(folder, mode, owner) == said


def test_the_file_of_passwords_lies_where_the_user_may_write() -> None:
    service = SERVICES["airflow"]
    assert f"useradd --uid {USER} --create-home forecart" in RECIPE
    assert RECIPE.rstrip().endswith("USER forecart")
    file = PurePosixPath(service["environment"][SETTING])
    assert file.parent == PurePosixPath("/home/forecart")
    assert not service.get("read_only")
    mounted = [PurePosixPath(volume.split(":")[1]) for volume in service["volumes"]]
    assert not any(file.is_relative_to(path) for path in mounted)
    # The rest of the environment is that of the others.
    others = SERVICES["airflow-scheduler"]["environment"]
    assert service["environment"] == others | {SETTING: str(file)}


def test_the_secret_reaches_the_api_server_alone() -> None:
    assert [name for name, service in SERVICES.items() if service.get("secrets")] == ["airflow"]


def test_what_is_secret_stays_out_of_commits_and_images() -> None:
    ignored = (FOLDER / ".gitignore").read_text().splitlines()
    secret = [PurePosixPath(entry["file"]).name for entry in COMPOSE["secrets"].values()]
    assert {f"/{name}" for name in (*secret, ".env")} <= set(ignored)
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"**/.env", *(f"deploy/compose/{name}" for name in secret)} <= set(left_out)


def test_what_was_made_here_stays_out_of_the_image() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    (made,) = re.findall(r"rm -rf \$\(VENV\) ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
    for name in made.replace("\\", "").split():
        assert any(fnmatch(name, rule) for rule in rules), name


def test_the_image_begins_with_the_champion_that_is_committed(tmp_path: Path) -> None:
    """One that `forecart promote` wrote is of a registry that the platform doesn't know."""
    (command,) = re.findall(r"^RUN (git checkout .*)$", RECIPE, re.M)
    assert RECIPE.index("install --yes --no-install-recommends git ") < RECIPE.index("COPY . .")
    assert RECIPE.index("COPY . .") < RECIPE.index(command) < RECIPE.index("chown --recursive")
    file = tmp_path / "champion.json"
    committed = (ROOT / "champion.json").read_text()
    file.write_text(committed)
    author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "start"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    file.write_text('{"digest": "sha256:0"}')
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert file.read_text() == committed
