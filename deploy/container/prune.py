"""Removes from an environment what a running service never reads: headers, tests, tools."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

# Relative to site-packages. Stubs and static libraries serve compilers; Flight is a
# protocol that nothing here speaks.
PATTERNS = (
    "torch/include",
    "torch/bin/protoc*",
    "torch/bin/test_*",
    "torch/share",
    "torch/test",
    "torch/**/*.pyi",
    "torch/**/*.a",
    "torch/utils/benchmark",
    "torch/utils/tensorboard",
    "pyarrow/*flight*",
    "pyarrow/include",
    "pyarrow/tests",
    "pyarrow/src",
    "pyarrow/**/*.pxd",
    "pyarrow/**/*.pyx",
    "numpy/**/tests",
    "numpy/_core/include",
    "numpy/f2py",
    "sympy/**/tests",
    "networkx/**/tests",
)


def main() -> None:
    """Remove them from this interpreter's environment."""
    packages = Path(sysconfig.get_paths()["purelib"])
    for pattern in PATTERNS:
        for path in list(packages.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


main()
