"""Addresses of databases as people write them."""

from __future__ import annotations

from typing import Any, Final

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
