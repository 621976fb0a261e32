"""API keys: who may call, and how often.

The file that FORECART_API_KEYS names holds a line per client, ``name sha256-of-the-key rate``, with
the rate in requests a second. Keys themselves are nowhere; `python -m serving.keys NAME` draws one
and prints it with its line. What the file says counts within seconds, without a restart, so that a
key that leaked can be withdrawn at once; a file that is none changes nothing.

Without keys anybody who can reach the service may call it, and a page in a browser can reach what
its user can: its site lets its own name point to the service. So what is called by a name is called
by one that is known, of this machine or of FORECART_HOSTS. Addresses cannot be made to point
elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from pipelines.errors import UserError
from serving.middleware import App, Receive, Send, refuse

KEYS_VARIABLE: Final = "FORECART_API_KEYS"
HOSTS_VARIABLE: Final = "FORECART_HOSTS"
HEADER: Final = b"x-api-key"
_BEARER: Final = b"bearer "
_DEFAULT_RATE: Final = 100.0
# Between two looks at the file.
_LOOK_SECONDS: Final = 2.0
_LOG: Final = logging.getLogger(__name__)

# Probes and metrics are the platform's, which holds no key.
_OPEN: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})

_OWN_HOSTS: Final = frozenset({"localhost"})
_PORT: Final = re.compile(r":\d*$")
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who holds a key.

    Attributes:
        name: for people.
        digest: SHA-256 of the key, hexadecimal.
        rate: requests a second, on average; twice as many at once.
    """

    name: str
    digest: str
    rate: float


def read_clients() -> list[Client] | None:
    """Return who may call; None where no keys are asked for.

    Raises:
        UserError: the file is missing, a line is none, or there is no line.
    """
    name = os.environ.get(KEYS_VARIABLE)
    if not name:
        return None
    clients = _read_file(Path(name))
    if not clients:
        raise UserError(f"{name}: no client; add one with: python -m serving.keys NAME")
    return clients


def _read_file(path: Path) -> list[Client]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{KEYS_VARIABLE}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{KEYS_VARIABLE}: {path}: not UTF-8") from None
    clients = []
    for number, line in enumerate(lines, start=1):
        parts = line.split("#", maxsplit=1)[0].split()
        if parts:
            clients.append(_parse(parts, f"{path}, line {number}"))
    return clients


def read_hosts() -> frozenset[str]:
    """Return the names by which the service is called without keys, those of FORECART_HOSTS.

    Raises:
        UserError: one of them is no name of a host.
    """
    names = os.environ.get(HOSTS_VARIABLE, "").lower().split(",")
    hosts = frozenset(name.strip() for name in names if name.strip())
    for name in sorted(hosts):
        if not _NAME.fullmatch(name):
            raise UserError(f"{HOSTS_VARIABLE}: {name}: not a name of a host, without port")
    return hosts | _OWN_HOSTS


def _parse(parts: list[str], where: str) -> Client:
    if len(parts) not in (2, 3) or len(parts[1]) != 64:
        raise UserError(f"{where}: expected: name, SHA-256 of the key, requests a second")
    try:
        digest = bytes.fromhex(parts[1]).hex()
        rate = float(parts[2]) if len(parts) == 3 else _DEFAULT_RATE
    except ValueError:
        raise UserError(f"{where}: not a SHA-256 or not a number") from None
    if not 0 < rate < float("inf"):
        raise UserError(f"{where}: the rate must be above zero")
    return Client(name=parts[0], digest=digest, rate=rate)


class RequireKey:
    """Lets in who holds a key, as often as agreed (token bucket).

    Without keys it lets in who calls the service by an address or a name that is known.

    Args:
        app: the application inside.
        clock: seconds.
    """

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        # Before it is read: what changes meanwhile is seen at the next look.
        self._seen = _observe()
        self._clients = read_clients()
        self._looked = clock()
        self._hosts = read_hosts()
        # Tokens left and when that was known, by client.
        self._tokens: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        self._follow()
        if self._clients is None:
            if not self._names_us(headers.get(b"host", b"localhost")):
                text = (
                    "without API keys the service is called by localhost, an IP address or a name "
                    f"in {HOSTS_VARIABLE}"
                )
                await refuse(send, HTTPStatus.BAD_REQUEST, text)
                return
            await self.app(scope, receive, send)
            return
        client = self._find(headers)
        if client is None:
            text = "send your API key in the header X-API-Key"
            await refuse(send, HTTPStatus.UNAUTHORIZED, text)
            return
        wait = self._take(client)
        if wait > 0:
            text = f"more than {client.rate:g} requests a second; wait {wait:.2f} s"
            retry = [(b"retry-after", str(int(wait) + 1).encode())]
            await refuse(send, HTTPStatus.TOO_MANY_REQUESTS, text, retry)
            return
        await self.app(scope, receive, send)

    def _follow(self) -> None:
        """Read the file anew where it has changed.

        One that cannot be read is told once, and changes nothing: to let nobody in any more, or
        everybody, would be worse than to go on with what was agreed. Of one without a line the
        last key was withdrawn.
        """
        now = self._clock()
        if self._clients is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        state = _observe()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._clients = _read_file(Path(os.environ[KEYS_VARIABLE]))
        except UserError as error:
            _LOG.error("the keys before go on to count: %s", error)
            return
        _LOG.warning("keys read anew: %d clients", len(self._clients))

    def _names_us(self, sent: bytes) -> bool:
        host = _PORT.sub("", sent.decode("latin-1")).lower()
        if host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _find(self, headers: dict[bytes, bytes]) -> Client | None:
        key = headers.get(HEADER, b"")
        bearer = headers.get(b"authorization", b"")
        if not key and bearer.lower().startswith(_BEARER):
            key = bearer[len(_BEARER) :].strip()
        digest = hashlib.sha256(key).hexdigest()
        found = None
        # Every client is compared, in time that does not tell which one it was.
        for client in self._clients or ():
            if hmac.compare_digest(client.digest, digest):
                found = client
        return found

    def _take(self, client: Client) -> float:
        """Take a token; return seconds until there is one."""
        now = self._clock()
        burst = max(1.0, 2 * client.rate)
        tokens, then = self._tokens.get(client.name, (burst, now))
        tokens = min(burst, tokens + (now - then) * client.rate)
        if tokens < 1.0:
            self._tokens[client.name] = (tokens, now)
            return (1.0 - tokens) / client.rate
        self._tokens[client.name] = (tokens - 1.0, now)
        return 0.0


def _observe() -> tuple[int, int, int] | None:
    """Return what tells two states of the file apart; None: there is no file."""
    try:
        # What a link names: Kubernetes exchanges links when a Secret changes.
        stat = Path(os.environ[KEYS_VARIABLE]).stat()
    except (KeyError, OSError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def main() -> int:
    """Draw a key and print it with its line."""
    if len(sys.argv) != 2 or not sys.argv[1].isidentifier():
        print("usage: python -m serving.keys NAME", file=sys.stderr)
        return 2
    key = secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    print(f"key (shown once):        {key}")
    print(f"line for {KEYS_VARIABLE}: {sys.argv[1]} {digest} {_DEFAULT_RATE:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
