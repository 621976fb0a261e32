"""Starts the service: `forecart serve` and the platform call this."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from pipelines.address import DEFAULT_STORE, STORE_VARIABLE, anchor_address
from pipelines.errors import UserError

SERVICE: Final = "serving.service:Forecart"

# BentoML keeps metrics of its workers in its home; the project's folder holds them, not the
# user's.
HOME: Final = Path(".forecart") / "bentoml"
SCORES: Final = Path("data") / "scores"


def serve(directory: Path, *, host: str = "127.0.0.1", port: int = 3000) -> NoReturn:
    """Become the server of a Bento or of a model; returns only by an error.

    The process is replaced, so that whoever started it supervises the server itself.

    Args:
        directory: a Bento (it holds bento.yaml) or a model's folder.
        host: address to bind.
        port: port to bind.

    Raises:
        UserError: the directory is neither, a variable holds what the service cannot use, or the
            address cannot be bound.
    """
    command, environment = plan_server(directory, host=host, port=port)
    check_settings(environment)
    check_address(host, port)
    os.execve(command[0], command, environment)  # noqa: S606 - an argument list, no shell


def plan_server(directory: Path, *, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the argument list and environment of the server process.

    Raises:
        UserError: the directory is neither a Bento nor a model.
    """
    directory = directory.resolve()
    environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True"}
    environment.setdefault("BENTOML_HOME", str(HOME.resolve()))
    # The server changes its folder; files are meant from the one that it was started from.
    # Empty is as good as none.
    store = environment.get(STORE_VARIABLE) or DEFAULT_STORE
    environment[STORE_VARIABLE] = anchor_address(store, Path.cwd())
    environment.setdefault("FORECART_EXPORTS", str(SCORES))
    exports = environment["FORECART_EXPORTS"].split(os.pathsep)
    environment["FORECART_EXPORTS"] = os.pathsep.join(_resolve(name) for name in exports if name)
    for name in ("FORECART_CHAMPION", "FORECART_API_KEYS"):
        if environment.get(name):
            environment[name] = _resolve(environment[name])
    Path(environment["BENTOML_HOME"]).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bentoml", "serve"]
    if (directory / "bento.yaml").is_file():
        command += [str(directory)]
    elif (directory / "model.safetensors").is_file():
        project = Path(__file__).resolve().parents[1]
        command += [SERVICE, "--working-dir", str(project)]
        environment["FORECART_MODEL"] = str(directory)
    else:
        raise UserError(f"{directory}: neither a Bento nor a model to serve")
    return [*command, "--host", host, "--port", str(port)], environment


def _resolve(name: str) -> str:
    # Links stay: to point one elsewhere is how some put a new model, or new keys, in place.
    return str(Path(name).absolute())


def check_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Fail while the service could not start: the server would try again and again.

    Args:
        environment: of the server; where it names a store, its address.

    Raises:
        UserError: says which variable is wrong.
    """
    # Here, since the command line starts without them.
    from serving.engine import find_count
    from serving.keys import read_clients, read_hosts
    from serving.store import Store
    from serving.swap import find_watched
    from serving.tracing import plan_tracing

    find_count()
    read_clients()
    read_hosts()
    find_watched()
    plan_tracing()
    if environment.get(STORE_VARIABLE):
        Store(environment[STORE_VARIABLE]).close()


def check_address(host: str, port: int) -> None:
    """Fail while an address cannot be bound.

    Raises:
        UserError: it is in use, or not this machine's.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is in use; choose another one with --port"
            raise UserError(message) from None
        raise UserError(f"cannot bind {host}:{port}: {error.strerror or error}") from None
