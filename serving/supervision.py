"""Keeps the supervisor's sockets to the user who serves.

BentoML starts the service through circus, which whoever reaches its sockets can have run any
command. It opens them on ports of loopback, for every user of the machine.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from bentoml._internal.utils import circus

# Of the path of a socket, on Linux and elsewhere; its name in the folder takes up to eight bytes.
_LONGEST: Final = 103 - len("/control")


class Arbiter(circus.Arbiter):  # type: ignore[misc]  # BentoML is not typed
    """A supervisor whose sockets lie in a folder that nobody else may enter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        folder = _make_folder()
        kwargs["endpoint"] = f"ipc://{folder}/control"
        kwargs["pubsub_endpoint"] = f"ipc://{folder}/events"
        super().__init__(*args, **kwargs)
        self.exit_stack.callback(shutil.rmtree, folder, ignore_errors=True)


def _make_folder() -> Path:
    """Return a new folder of mode 0700 in the one for temporary files, or where paths are short."""
    folder = Path(tempfile.mkdtemp(prefix="forecart-"))
    if len(bytes(folder)) <= _LONGEST:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="forecart-", dir="/tmp"))


def install() -> None:
    """Have BentoML, which imports the service before it starts a supervisor, start this one."""
    circus.Arbiter = Arbiter
