"""Copies of models for those who serve them, and the removal of what killed ones have left."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipelines.errors import UserError
from pipelines.io import take_lock
from serving.golden import GOLDEN_FILE, MODEL, locate_golden

_PREFIX: Final = "forecart-model-"
_LOCK: Final = "lock"
# A folder that is younger may still be without its holder's lock.
_YOUNG_SECONDS: Final = 60.0


class Copy:
    """The files of a model as they were when it was taken, in a temporary folder.

    Other ones may be put in their place, good or bad, and a process that is started later has to
    hold what the others do. A lock on the folder ends with the process, however that ends, so that
    what a killed one has left is told, and goes with the next copy.

    Args:
        source: the model's folder; its golden predictions are copied as well.

    Raises:
        UserError: there is no such folder.
        OSError: it cannot be copied.

    Attributes:
        model: folder of the copy.
    """

    def __init__(self, source: Path) -> None:
        if not source.is_dir():
            raise UserError(f"{source}: no such folder")
        remove_left()
        self._source = source
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _open_lock(self._folder)
        take_lock(self._lock)
        self.model = self._folder / MODEL
        try:
            golden = locate_golden(source)
            if golden.is_file():
                shutil.copyfile(golden, self._folder / GOLDEN_FILE)
            shutil.copytree(source, self.model)
        except BaseException:
            self.remove()
            raise

    def name_source(self, text: str) -> str:
        """Return a text about the copy as one about the model's own folder."""
        return text.replace(str(self.model), str(self._source))

    def remove(self) -> None:
        """Delete the copy."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def remove_left() -> None:
    """Delete the copies of processes that are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Another may remove it at this moment, and it may be somebody else's.
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
                continue
            lock = _open_lock(folder)
            try:
                if take_lock(lock):
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
