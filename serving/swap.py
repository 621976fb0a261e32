"""Takes a newly promoted model while the service runs; a bad one is refused.

FORECART_CHAMPION names what is watched: a project's champion.json (the model lies in the project's
cache under its digest), a Bento, or a model's folder. The new model is loaded and checked beside
the one that serves, which goes on until the other has passed; batches never mix two.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from pipelines.errors import UserError
from pipelines.io import digest_directory, read_json
from serving.golden import GOLDEN_FILE, MODEL, compare_predictions
from serving.metrics import Metrics

if TYPE_CHECKING:
    from pipelines.model.predictor import Predictor

CHAMPION_VARIABLE: Final = "FORECART_CHAMPION"
SECONDS_VARIABLE: Final = "FORECART_CHAMPION_SECONDS"

# Where a project keeps the files of its champions, by digest.
_CACHE: Final = Path(".forecart") / "models"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DEFAULT_SECONDS: Final = 10.0
_LOG: Final = logging.getLogger(__name__)

# Name, time of change in ns and size of every file: what tells at no cost that nothing is new.
State = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and what it is called.

    Attributes:
        predictor: the model.
        digest: of its files.
    """

    predictor: Predictor
    digest: str


def load(model: Path) -> Loaded:
    """Load a model's folder.

    Raises:
        UserError: it holds no model that this code can use.
    """
    from pipelines.model.predictor import Predictor

    return Loaded(predictor=Predictor.load(model), digest=digest_directory(model))


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


def check(model: Path, digest: str | None) -> Loaded:
    """Load a model and make sure of it.

    Args:
        model: its folder; golden predictions lie beside it in a Bento.
        digest: that it has to have; None = any.

    Raises:
        UserError: it is not the model that was promoted, or does not predict what it should.
    """
    loaded = load(model)
    if digest is not None and loaded.digest != digest:
        raise UserError(f"{model}: the files are {loaded.digest}, not {digest}")
    golden = model.parent / GOLDEN_FILE
    if golden.is_file():
        problem = compare_predictions(loaded.predictor, read_json(golden), loaded.digest)
        if problem is not None:
            raise UserError(f"{model}: {problem}")
    _probe(loaded.predictor)
    return loaded


def _probe(predictor: Predictor) -> None:
    """Predict a shopper without events: the least that every model can do."""
    from pipelines.features.store import encode_events

    predicted = predictor.predict(encode_events([[]]), np.zeros(1, dtype=np.int64))
    wrong = [name for name, values in predicted.items() if not np.all(np.isfinite(values))]
    if wrong:
        raise UserError(f"predicts no number for {', '.join(sorted(wrong))}")


class Watcher:
    """Looks for a new model every few seconds, in a thread of its own.

    Args:
        watched: champion.json, a Bento or a model's folder.
        current: what serves.
        take: is given the new model, after it has passed.
        metrics: are told of swaps.
        seconds: between two looks.
    """

    def __init__(
        self,
        watched: Path,
        *,
        current: Loaded,
        take: Callable[[Loaded], None],
        metrics: Metrics,
        seconds: float = _DEFAULT_SECONDS,
    ) -> None:
        self._watched = watched
        self._current = current.digest
        self._take = take
        self._metrics = metrics
        self._seconds = seconds
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
        """Take or refuse what is new; a state of the files is judged once."""
        try:
            state = _observe(self._watched)
            if state == self._seen:
                return
            self._seen = state
            found = locate(self._watched)
            if found is None or self._serves(*found):
                return
            loaded = check(*found)
        except Exception as error:  # whatever is wrong with the new one, the old one goes on
            # Shapes that do not fit, a file cut short, no memory: all are reasons to refuse.
            self._metrics.count_swap(taken=False)
            _LOG.error("the new model is refused, the old one goes on: %s", error)
            return
        before, self._current = self._current, loaded.digest
        self._take(loaded)
        self._metrics.count_swap(taken=True)
        self._metrics.show_model(loaded.digest, before=before)
        _LOG.warning("model %s serves instead of %s", loaded.digest, before)

    def _serves(self, model: Path, digest: str | None) -> bool:
        if digest is None:
            digest = digest_directory(model)
        return digest == self._current

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self.look()


def _observe(watched: Path) -> State:
    """Return what tells two states of the watched files apart."""
    files = [watched]
    found = locate(watched)
    if found is not None:
        files += [*sorted(found[0].rglob("*")), found[0].parent / GOLDEN_FILE]
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
    if not 0 < seconds < float("inf"):
        raise UserError(f"{SECONDS_VARIABLE}: {text!r} is no time in seconds")
    return Path(name), seconds
