"""Takes a newly promoted model while the service runs; a bad one is refused.

FORECART_CHAMPION names what is watched: a project's champion.json (the model lies in the project's
cache under its digest), a Bento, or a model's folder. The new model is loaded and checked in
processes of its own beside those that serve, which go on until it has passed; batches never mix
two.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipelines.errors import UserError
from pipelines.io import digest_directory, read_json
from serving.golden import MODEL, locate_golden
from serving.metrics import Metrics

CHAMPION_VARIABLE: Final = "FORECART_CHAMPION"
SECONDS_VARIABLE: Final = "FORECART_CHAMPION_SECONDS"

# Where a project keeps the files of its champions, by digest.
_CACHE: Final = Path(".forecart") / "models"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DEFAULT_SECONDS: Final = 10.0
# A day: whoever looks more rarely starts the service anew.
_MOST_SECONDS: Final = 86_400.0
# The longest time between two tries to take a model.
_LONGEST_PAUSE: Final = 600.0
_LOG: Final = logging.getLogger(__name__)

# Name, time of change in ns and size of every file: what tells at no cost that nothing is new.
State = tuple[tuple[str, int, int], ...]


def locate(watched: Path) -> tuple[Path, str | None] | None:
    """Find the model that is meant.

    Args:
        watched: champion.json, a Bento or a model's folder.

    Returns:
        The model's folder, and the digest that it has to have where one is told; None while there
        is no champion.

    Raises:
        UserError: champion.json does not hold what it should.
    """
    if watched.is_dir():
        bundled = watched / "src" / MODEL
        return (bundled if bundled.is_dir() else watched), None
    if not watched.exists():
        return None
    content = read_json(watched)
    digest = content.get("digest") if isinstance(content, dict) else None
    if digest is None:
        return None
    if not _DIGEST.fullmatch(str(digest)):
        raise UserError(f"{watched}: digest {digest!r} is none")
    return watched.parent / _CACHE / digest.removeprefix("sha256:"), digest


class Watcher:
    """Looks for a new model every few seconds, in a thread of its own.

    Args:
        watched: champion.json, a Bento or a model's folder.
        current: digest of the model that serves.
        take: is given the folder of a new model and the digest that it has to have, if one is
            told; makes it serve and returns its digest, or raises where it is refused.
        metrics: are told of swaps.
        seconds: between two looks.
    """

    def __init__(
        self,
        watched: Path,
        *,
        current: str,
        take: Callable[[Path, str | None], str],
        metrics: Metrics,
        seconds: float = _DEFAULT_SECONDS,
    ) -> None:
        self._watched = watched
        self._current = current
        self._take = take
        self._metrics = metrics
        self._seconds = seconds
        self._pause = seconds
        self._seen: State | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def look(self) -> None:
        """Take or refuse what is new; a state of the files is judged once.

        What went wrong and says nothing of the model is tried again, ever more rarely.
        """
        pause, self._pause = self._pause, self._seconds
        try:
            state = _observe(self._watched)
            if state == self._seen:
                return
            self._seen = state
            found = locate(self._watched)
            if found is None or self._serves(*found):
                return
            digest = self._take(*found)
        except UserError as error:
            self._metrics.count_swap(taken=False)
            _LOG.error("the new model is refused, the old one goes on: %s", error)
            return
        except Exception as error:  # whatever it was, the old one goes on
            self._seen = None
            self._pause = min(2 * pause, _LONGEST_PAUSE)
            text = "the new model was not taken, the old one goes on; again in %g s: %s"
            _LOG.error(text, self._pause, error or type(error).__name__)
            return
        before, self._current = self._current, digest
        self._metrics.count_swap(taken=True)
        self._metrics.show_model(digest, before=before)
        _LOG.warning("model %s serves instead of %s", digest, before)

    def _serves(self, model: Path, digest: str | None) -> bool:
        if digest is None:
            digest = digest_directory(model)
        return digest == self._current

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            self.look()


def _observe(watched: Path) -> State:
    """Return what tells two states of the watched files apart."""
    files = [watched]
    found = locate(watched)
    if found is not None:
        files += [*sorted(found[0].rglob("*")), locate_golden(found[0])]
    states = []
    for path in files:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        states.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(states)


def find_watched() -> tuple[Path, float] | None:
    """Return what to watch and how often in seconds; None where nothing is.

    Raises:
        UserError: the time is none.
    """
    name = os.environ.get(CHAMPION_VARIABLE)
    if not name:
        return None
    text = os.environ.get(SECONDS_VARIABLE, str(_DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MOST_SECONDS:
        text = f"{text!r} is no time of up to {_MOST_SECONDS:,.0f} seconds"
        raise UserError(f"{SECONDS_VARIABLE}: {text}")
    return Path(name), seconds
