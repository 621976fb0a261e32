"""Real database servers on loopback, in folders of their own, that a test may kill."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

HINT = "install it with: apt-get install {} (make test does where apt is allowed)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A database server that can be killed and started again.

    Args:
        command: argument list of the server, which stays in the foreground.
        user: who runs it; None = this process's user.
        url: where it answers.
        log: file for its output.
    """

    def __init__(self, command: list[str], user: str | None, url: str, log: Path) -> None:
        self.command = command
        self.user = user
        self.url = url
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                user=self.user,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        engine = create_engine(self.url)
        deadline = time.monotonic() + 60
        while True:
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
                break
            except SQLAlchemyError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)
        engine.dispose()

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def run_postgres() -> Iterator[Server]:
    """A PostgreSQL server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.fail("PostgreSQL is missing; " + HINT.format("postgresql"))
    # It refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    with _folder(user) as folder:
        data, port = folder / "data", free_port()
        subprocess.run(
            [
                *[str(found[-1].parent / "initdb"), "--pgdata", str(data), "--auth", "trust"],
                *["--username", "forecart", "--encoding", "UTF8", "--locale", "C"],
            ],
            user=user,
            cwd="/",
            check=True,
            capture_output=True,
        )
        server = Server(
            [
                *[str(found[-1]), "-D", str(data), "-p", str(port)],
                *["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"],
            ],
            user,
            f"postgresql+psycopg://forecart@127.0.0.1:{port}/postgres",
            folder / "log",
        )
        with _running(server):
            yield server


@contextmanager
def run_mariadb() -> Iterator[Server]:
    """A MariaDB server."""
    binary, install = Path("/usr/sbin/mariadbd"), shutil.which("mariadb-install-db")
    if not binary.exists() or install is None:
        pytest.fail("MariaDB is missing; " + HINT.format("mariadb-server"))
    user = "mysql" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    with _folder(user) as folder:
        data, port = folder / "data", free_port()
        # The account of the test has to exist before the server listens.
        setup = folder / "setup.sql"
        setup.write_text(
            "CREATE DATABASE IF NOT EXISTS forecart CHARACTER SET utf8mb4;\n"
            "CREATE USER IF NOT EXISTS 'forecart'@'127.0.0.1' IDENTIFIED BY 'forecart';\n"
            "GRANT ALL ON forecart.* TO 'forecart'@'127.0.0.1';\n"
        )
        setup.chmod(0o644)
        subprocess.run(
            [
                *[install, "--no-defaults", f"--datadir={data}", "--skip-test-db"],
                *["--auth-root-authentication-method=normal", f"--user={user}"],
            ],
            cwd="/",
            check=True,
            capture_output=True,
        )
        server = Server(
            [
                *[str(binary), "--no-defaults", f"--datadir={data}", f"--port={port}"],
                *["--bind-address=127.0.0.1", f"--socket={folder / 'socket'}"],
                *[f"--pid-file={folder / 'pid'}", f"--init-file={setup}", "--skip-name-resolve"],
            ],
            user if os.getuid() == 0 else None,
            f"mysql+pymysql://forecart:forecart@127.0.0.1:{port}/forecart?charset=utf8mb4",
            folder / "log",
        )
        with _running(server):
            yield server


@contextmanager
def _running(server: Server) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.stop()


@contextmanager
def _folder(user: str | None) -> Iterator[Path]:
    """A folder that the server's user can reach; paths of sockets have to be short."""
    folder = Path(tempfile.mkdtemp(prefix="db-"))
    folder.chmod(0o755)
    if user is not None and os.getuid() == 0:
        shutil.chown(folder, user)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
