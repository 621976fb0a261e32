"""Set-up of all tests."""

from __future__ import annotations

import sys

# PySpark, which Great Expectations imports where it is installed, takes a main module without a
# file for a doctest run and ends the process; a pytest-xdist worker has such a main module.
_main = sys.modules["__main__"]
if not hasattr(_main, "__file__"):
    _main.__file__ = __file__
