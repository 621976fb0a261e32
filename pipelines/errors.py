"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input, told in one line that names the file, row or key.

    The command line prints the message without a traceback and exits with code 2.
    """
