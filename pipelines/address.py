"""Addresses of databases as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from pipelines.errors import UserError

# Where the service keeps what it collects, and ingest finds it.
STORE_VARIABLE: Final = "FORECART_STORE"
DEFAULT_STORE: Final = "sqlite:///.forecart/events.db"

# Where MLflow keeps runs and models; the project has a file of its own for them.
REGISTRY_VARIABLE: Final = "MLFLOW_TRACKING_URI"
REGISTRY: Final = Path("mlflow.db")

# In a folder's name, what an address takes for its end or for another character.
_NOT_IN_ADDRESSES: Final = re.compile(r"\?|%[0-9A-Fa-f]{2}")

_LOGIN: Final = re.compile(r"://[^:/]*(?::.*)?@", re.DOTALL)
_PAGE_ON_PORT: Final = re.compile(r"https?://[^/@]*:\d+/")
_SECRETS: Final = re.compile(
    r"([?&][^=&]*(?:auth|key|pass|pwd|secret|signature|token)[^=&]*=)[^&]*", re.IGNORECASE
)

# The drivers that this project installs, of the names that say none.
_DRIVERS: Final = {
    "mariadb": "mariadb+pymysql",
    "mysql": "mysql+pymysql",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
}


def parse_address(text: str) -> Any:
    """Return SQLAlchemy's ``URL``; an address that names no driver gets one that is installed.

    Args:
        text: for example ``sqlite:///file``, ``postgresql://user@host/name`` or
            ``mysql+pymysql://user@host/name``.

    Raises:
        sqlalchemy.exc.ArgumentError: it is no address.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except ValueError:
        raise ArgumentError("the port in the address is not a number") from None
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def anchor_address(text: str, folder: Path) -> str:
    """Return an address that names the same file of SQLite from every folder.

    Args:
        text: as for ``parse_address``.
        folder: that a relative file is in; any other address stays as it is.

    Raises:
        UserError: no address can name a file in the folder.
    """
    relative = re.fullmatch(r"(sqlite(?:\+\w+)?:///)((?!file:)[^/:].*)", text)
    if relative is None:
        return text
    # Encoded they would do for SQLAlchemy, but MLflow makes a folder of the encoded name.
    if wrong := _NOT_IN_ADDRESSES.search(str(folder)):
        raise UserError(
            f"{folder}: the address of a database cannot hold {wrong[0]!r}; rename the folder"
        )
    return f"{relative[1]}{folder / relative[2]}"


def find_registry(home: Path) -> str:
    """Return the address of MLflow: the one that is set, where none or an empty one is the default.

    Args:
        home: the project's folder. A run's workspace is to find what the project finds, not a
            file of its own, which goes with it.

    Raises:
        UserError: no address can name a file in the project's folder.
    """
    given = os.environ.get(REGISTRY_VARIABLE) or f"sqlite:///{REGISTRY}"
    return anchor_address(given, home.resolve())


def lacks_registry(home: Path) -> bool:
    """Tell whether the project's own file is to be used and is not there.

    MLflow makes one where it finds none, so that a wrong folder would get one.
    """
    return not os.environ.get(REGISTRY_VARIABLE) and not (home / REGISTRY).exists()


def hide_login(text: str) -> str:
    """Return an address without who connects, and without passwords and keys, wherever they are."""
    # A password may hold any character, as SQLAlchemy reads addresses; but an @ in the path of a
    # page that is on a port is none's end.
    if _PAGE_ON_PORT.match(text) is None:
        text = _LOGIN.sub("://", text)
    return _SECRETS.sub(r"\1***", text)
