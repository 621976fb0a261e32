"""Errors that are the user's to mend."""

from __future__ import annotations

from importlib.util import find_spec


class UserError(Exception):
    """A mistake in the input, told in one line that names the file, row or key.

    The command line prints the message without a traceback and exits with code 2.
    """


def require(package: str) -> None:
    """Refuse to go on without a package that not everybody needs.

    Args:
        package: the name by which it is imported.

    Raises:
        UserError: it is not installed.
    """
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: make setup")
