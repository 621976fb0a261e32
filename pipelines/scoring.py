"""`forecart score`: every shopper's predictions as of one time -> data/scores.

Users are scored in chunks of bounded size over the memory-mapped sequences. Each finished chunk
is a Parquet file in a folder that is named by everything the result follows from (model, data,
time): a killed run goes on after its last finished chunk, and one about other inputs starts anew.
The folder takes the place of data/scores when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import Which
from pipelines.errors import UserError
from pipelines.events import TIMESTAMP, EventType, to_us
from pipelines.features.cuts import DAY, Split
from pipelines.features.store import Sequences
from pipelines.io import (
    digest_directory,
    digest_file,
    guard_cells,
    progress,
    read_json,
    replace_file,
    say_count,
    take_lock,
    write_json,
    write_table,
)
from pipelines.model.timeline import Timeline, bisect
from pipelines.registry.champion import (
    MODEL,
    check_files,
    fetch_champion,
    read_champion,
)
from pipelines.registry.verdict import VERDICT, find_verdict

if TYPE_CHECKING:
    from pipelines.model.predictor import Predictor

FEATURES: Final = Path("data/features")
SCORES: Final = Path("data/scores")
# Readers of Parquet folders pass over names that begin with an underscore.
DESCRIPTION: Final = "_scores.json"
FORMAT: Final = 3

NEXT_ITEMS: Final = 5

# A chunk ends at whichever comes first: memory follows the events, the files' number the users.
CHUNK_USERS: Final = 4096
CHUNK_EVENTS: Final = 250_000

_PARTIAL: Final = Path("data/.scores")
_LEAST_KNOWN: Final = 0.01  # share of the items


def score(
    root: Path,
    *,
    which: Which = Which.AUTO,
    at: datetime | None = None,
    csv: Path | None = None,
    embeddings: bool = False,
) -> str:
    """Score all shoppers that were seen before a time.

    Args:
        root: the project's folder.
        which: the model.
        at: aware; None = the end of the data, or this hour where that is earlier. Events from then
            on are not looked at.
        csv: also write the result there, as one file.
        embeddings: also tell what the model makes of each history, as a list of numbers.

    Returns:
        What was done, for people.

    Raises:
        UserError: an input is missing, the time is outside of the data, the CSV file cannot be
            written, or another process scores this project.
    """
    if csv is not None:
        _check_csv(root, csv)
    name, folder = find_model(root, which)
    with _hold_lock(root):
        plan = _plan(root, name, folder, at) | {"embeddings": embeddings}
        present = root / SCORES / DESCRIPTION
        if present.exists() and read_json(present) == plan:
            done = f"{SCORES} holds the scores of {say_count(_count(root), 'shopper')} already"
        else:
            resumed = _score_chunks(root, folder, plan)
            done = f"{say_count(_count(root), 'shopper')} scored{resumed}; see {SCORES}"
        if csv is not None:
            write_csv(root / SCORES, csv)
            done += f" and {csv}"
    doubt = find_doubt(root, plan["model"])
    by = "" if doubt is None else f"; they are by {doubt}"
    told = f"{done} ({name}, as of {plan['at'][:16]}){by}; next: forecart pages"
    return (
        told + _warn_of_other_data(root, folder) + _warn(root, datetime.fromisoformat(plan["at"]))
    )


def _warn_of_other_data(root: Path, folder: Path) -> str:
    """Return a line of warning where the model knows next to none of the items, else nothing."""
    here = set(read_json(root / FEATURES / "vocabulary.json").get("item", []))
    known = set(read_json(folder / "config.json")["vocabulary"]["item"])
    if not here or not known or len(here & known) >= _LEAST_KNOWN * len(here):
        return ""
    return (
        f"\nwarning: of the {say_count(len(here), 'item')} in these data the model knows "
        f"{len(here & known):,}: it was trained on others; forecart run trains one on these"
    )


def _warn(root: Path, at: datetime) -> str:
    """Return a line of warning where the model knows answers from after a time, else nothing."""
    cuts = read_json(root / FEATURES / "cuts.json").get("cuts", [])
    # The last fit learns from all windows that closed before the first test cut.
    tests = [datetime.fromisoformat(c["ts"]) for c in cuts if c["split"] == Split.TEST]
    if not tests or at >= min(tests):
        return ""
    return (
        f"\nwarning: training reaches to {min(tests):%Y-%m-%d}: the model knows answers from after "
        "that time, so these are no predictions made back then; for such: forecart backtest"
    )


def find_doubt(root: Path, model: str) -> str | None:
    """Say what a model is that scores without being champion.

    Args:
        root: the project's folder.
        model: digest of the model's files.

    Returns:
        For people; None where it is the champion.

    Raises:
        UserError: champion.json is damaged.
    """
    if read_champion(root).digest == model:
        return None
    verdict = find_verdict(root) or {}
    if verdict.get("champion") == model:
        return "a former champion"
    if verdict.get("candidate") != model:
        return "a model that is not champion and has no verdict"
    if verdict.get("passed"):
        return "a candidate that passed the gate but was not promoted"
    return f"a candidate that failed the gate and was not promoted, see {VERDICT}"


def _check_csv(root: Path, path: Path) -> None:
    """Refuse a CSV file that cannot be written or would be read as a part of the scores.

    Raises:
        UserError: naming the file.
    """
    if path.is_dir():
        raise UserError(f"--csv {path}: is a folder; name a file")
    real = path.resolve()
    if any(real.is_relative_to((root / own).resolve()) for own in (SCORES, _PARTIAL)):
        raise UserError(f"--csv {path}: {SCORES} holds the scores alone; name a file elsewhere")
    folder = next(parent for parent in real.parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"--csv {path}: {folder} is no folder; name a file in one")
    # Permissions do not tell of all that a folder may refuse.
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = f"{folder} takes no file ({error.strerror})"
        raise UserError(f"--csv {path}: {told}; name a file elsewhere") from None


def find_model(root: Path, which: Which) -> tuple[str, Path]:
    """Return which model scores, and the folder with its files.

    Raises:
        UserError: there is no such model.
    """
    if which is not Which.CANDIDATE:
        champion = fetch_champion(root)
        if champion is not None:
            return "champion", champion
        if which is Which.CHAMPION:
            raise UserError(
                "there is no champion; run: forecart promote, or forecart status where it was "
                "promoted elsewhere, or --model candidate"
            )
    if not (root / MODEL).is_dir():
        raise UserError(f"{root / MODEL}: no such folder; run: dvc repro")
    check_files(root / MODEL)
    return "candidate", root / MODEL


def plan_chunks(offsets: Any, *, users: int, events: int) -> list[tuple[int, int]]:
    """Cut users into runs of at most so many users and, but for a single one, events.

    Args:
        offsets: int64 (U + 1,), of ``Sequences``.
        users: most users in a chunk.
        events: most events in a chunk, unless one user alone has more.

    Returns:
        (low, high) pairs that cover all users in order.
    """
    total, low = len(offsets) - 1, 0
    chunks: list[tuple[int, int]] = []
    while low < total:
        fits = int(np.searchsorted(offsets, offsets[low] + events, side="right")) - 1
        high = min(max(fits, low + 1), low + users, total)
        chunks.append((low, high))
        low = high
    return chunks


def score_chunk(
    predictor: Predictor,
    sequences: Sequences,
    people: pa.Table,
    at: int,
    silent_us: int | None,
    *,
    embeddings: bool = False,
) -> pa.Table:
    """Score the users of a chunk.

    Args:
        predictor: the model.
        sequences: U users.
        people: their rows of users.parquet.
        at: microseconds; events from then on are not looked at.
        silent_us: a user without an event for longer is outside of the population that the model
            was calibrated on; None = nobody is.
        embeddings: with a column of them.

    Returns:
        One row for each user with an event before the time.
    """
    timeline = Timeline(sequences)
    everyone = np.arange(sequences.users, dtype=np.int64)
    cuts = timeline.cuts(everyone, np.full(sequences.users, at, dtype=np.int64))
    start = timeline.offsets[:-1]
    seen = np.flatnonzero(cuts.position > start)
    cuts = cuts.take(seen)
    ahead = predictor.look_ahead(timeline, cuts, NEXT_ITEMS)
    predicted = predictor.finish(ahead.raw)
    days = np.full(len(cuts), np.nan)
    if EventType.PURCHASE.value in predictor.spec.heads.events:
        days = predictor.days_until(ahead.raw, EventType.PURCHASE.value).astype(np.float64)
    known = np.array(predictor.spec.vocabulary.item_id, dtype=object)
    last = timeline.ts[cuts.position - 1]
    month = np.full(len(cuts), at - 28 * (DAY // timedelta(microseconds=1)))
    recent = cuts.position - bisect(timeline.ts, start[seen], cuts.position, month)
    active = np.ones(len(cuts), dtype=bool) if silent_us is None else last >= at - silent_us
    rows = people.take(pa.array(seen))
    columns: dict[str, Any] = {
        "user": rows["user"],
        "user_id": rows["user_id"],
        **{name: pa.array(values) for name, values in predicted.items()},
        "next_purchase_ts": _add_days(at, days),
        "next_items": pa.array(
            [known[codes].tolist() for codes in ahead.items], pa.list_(pa.string())
        ),
        "next_item_chances": pa.array(list(ahead.chances), pa.list_(pa.float32())),
        "active": pa.array(active),
        "events": pa.array(cuts.position - start[seen]),
        "events_28d": pa.array(recent),
        "first_event_ts": pa.array(timeline.ts[start[seen]]).cast(TIMESTAMP),
        "last_event_ts": pa.array(last).cast(TIMESTAMP),
        **{name: rows[name] for name in ("age", "gender", "region", "signup_ts")},
    }
    if embeddings:
        columns["embedding"] = pa.array(list(ahead.embedding), pa.list_(pa.float32()))
    return pa.table(columns)


def _add_days(at: int, days: NDArray[np.float64]) -> pa.Array:
    """Return the times so many days after a time; NaN gives null."""
    missing = np.isnan(days)
    ts = at + (np.where(missing, 0.0, days) * (DAY / timedelta(microseconds=1))).astype(np.int64)
    return pa.array(ts, mask=missing).cast(TIMESTAMP)


def write_csv(scores: Path, path: Path) -> None:
    """Write scores as one CSV file, part by part.

    Texts that a spreadsheet would run as a formula get a leading apostrophe.
    """
    with replace_file(path) as partial:
        writer: pacsv.CSVWriter | None = None
        try:
            for batch in ds.dataset(scores, format="parquet").to_batches():
                safe = guard_table(pa.Table.from_batches([batch]))
                writer = writer or pacsv.CSVWriter(partial, safe.schema)
                writer.write_table(safe)
        finally:
            if writer is not None:
                writer.close()


def guard_table(table: pa.Table) -> pa.Table:
    """Return the table with every text guarded against spreadsheets, and lists as JSON."""
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            # A JSON list begins with a bracket, which no spreadsheet runs.
            texts = [None if v is None else json.dumps(v) for v in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_string(field.type):
            cells = pa.array(guard_cells(table.column(i).to_pylist()), pa.string())
            table = table.set_column(i, field.name, cells)
    return table


def _count(root: Path) -> int:
    dataset = ds.dataset(root / SCORES, format="parquet")
    return int(dataset.count_rows())


def _plan(root: Path, name: str, model: Path, at: datetime | None) -> dict[str, Any]:
    """Return the content of _scores.json: what the result follows from."""
    cuts = read_json(root / FEATURES / "cuts.json")
    first, end = (datetime.fromisoformat(cuts[key]) for key in ("first_ts", "end_ts"))
    chosen = _choose_time(first, end, datetime.now(UTC)) if at is None else at
    if not first < chosen <= end:
        raise UserError(
            f"--at {chosen.isoformat()}: outside of the data, which reach from "
            f"{first.isoformat()} to {end.isoformat()}"
        )
    schema = read_json(root / FEATURES / "schema.json")
    config = read_json(model / "config.json")
    sequences = digest_directory(root / FEATURES / "sequences")
    people = digest_file(root / FEATURES / "users.parquet")
    offsets = np.load(root / FEATURES / "sequences/offsets.npy", mmap_mode="r", allow_pickle=False)
    return {
        "format": FORMAT,
        "role": name,
        "model": digest_directory(model),
        "data": f"sha256:{hashlib.sha256(f'{sequences} {people}'.encode()).hexdigest()}",
        "at": chosen.astimezone(UTC).isoformat(),
        "users": int(len(offsets) - 1),
        "targets": config["targets"],
        "active_within_days": schema["population_active_within_days"],
    }


def _choose_time(first: datetime, end: datetime, now: datetime) -> datetime:
    """Return the end of the data, or the hour that has begun where that is earlier.

    Data of a live shop end with a day that is not over: what is left of it would count as silence.
    Of equal hours the times are equal, so that a result that was begun is gone on with.
    """
    hour = now.replace(minute=0, second=0, microsecond=0)
    return min(end, hour) if hour > first else end


def _score_chunks(root: Path, model: Path, plan: dict[str, Any]) -> str:
    """Score what is left and put the result in place; return a note on what was done before."""
    from pipelines.model.predictor import Predictor

    sequences = Sequences.load(root / FEATURES / "sequences")
    chunks = plan_chunks(sequences.offsets, users=CHUNK_USERS, events=CHUNK_EVENTS)
    key = hashlib.sha256(json.dumps([plan, chunks], sort_keys=True).encode()).hexdigest()[:16]
    folder = root / _PARTIAL / key
    _remove_others(root / _PARTIAL, key)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"part-{number:06d}.parquet" for number in range(len(chunks))]
    left = [(file, chunk) for file, chunk in zip(files, chunks, strict=True) if not file.exists()]
    predictor = Predictor.load(model)
    days = plan["active_within_days"]
    silent = None if days is None else int(days * DAY / timedelta(microseconds=1))
    at = to_us(datetime.fromisoformat(plan["at"]))
    people = _People(root / FEATURES / "users.parquet")
    for file, (low, high) in progress(left, "score", total=len(left), unit="chunk"):
        part = sequences.slice(low, high)
        rows = people.read(low, high)
        told = score_chunk(predictor, part, rows, at, silent, embeddings=plan["embeddings"])
        write_table(file, told)
    write_json(folder / DESCRIPTION, plan)
    _swap(folder, root / SCORES)
    reused = len(chunks) - len(left)
    return f" ({reused} of {len(chunks)} chunks by a run before)" if reused else ""


class _People:
    """Rows of users.parquet by position; one row group is held."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        groups = range(self._file.metadata.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._held = -1
        self._rows: pa.Table | None = None

    def read(self, low: int, high: int) -> pa.Table:
        """Return rows ``low:high``."""
        parts = []
        first = int(np.searchsorted(self._starts, low, side="right")) - 1
        for group in range(first, len(self._starts) - 1):
            start = int(self._starts[group])
            if start >= high:
                break
            if group != self._held or self._rows is None:
                self._held, self._rows = group, self._file.read_row_group(group)
            begin = max(low - start, 0)
            parts.append(self._rows.slice(begin, high - start - begin))
        return pa.concat_tables(parts)


def _remove_others(folder: Path, key: str) -> None:
    """Remove what runs about other inputs left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.name != key:
            shutil.rmtree(path)


def _swap(new: Path, place: Path) -> None:
    """Put a folder in the place of another; a reader sees the one, none for a moment, the other."""
    old = new.with_name("old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def _hold_lock(root: Path) -> Iterator[None]:
    """Let one process at a time score a project; the lock ends with its holder."""
    path = root / _PARTIAL / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not take_lock(handle):
            raise UserError(f"{root}: another process is scoring; wait for it to end")
        yield
    finally:
        os.close(handle)
