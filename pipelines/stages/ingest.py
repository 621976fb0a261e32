"""Read events from the source into day partitions; set aside what breaks the schema.

Rules, the same for every source:
    * Only events before ``ingest.until`` are kept.
    * A purchase with a negative quantity is a refund of as much; a refund's quantity is
      positive however the source signs it. Prices stay as they are.
    * An event without an event_id gets a content hash: the MD5 of all other columns (after
      the rules above) as a JSON array, times in microseconds. Lines that repeat each other in
      every column thus share an id.
    * Of events with one id the first by time is kept, of equal times the first read. Those
      with the same content are its duplicates, others are damage: what is taken for an id
      does not tell events apart. With ``ingest.files.keep_repeats``, repeats of a hashed event
      get the suffix -2, -3, ... and are kept.
    * What an event lacks of category, brand and price is taken from the items table, where one
      is given, after the content hash: ids do not depend on that table.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import Params, Source
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, ITEM_SCHEMA, TIMESTAMP, USER_SCHEMA, EventType
from pipelines.io import (
    DUCKDB_MEMORY,
    progress,
    read_json,
    replace_directory,
    say_count,
    spill_to,
    write_json,
    write_table,
)
from pipelines.sources import base
from pipelines.sources.base import (
    NESTED,
    NESTED_ADVICE,
    QUARANTINE_SCHEMA,
    ROW,
    UNKNOWN_TYPE,
    Batch,
    Kind,
)
from pipelines.sources.catalog import open_source
from pipelines.sources.files import NOT_UTF8, NOT_UTF8_ADVICE, OPEN_QUOTE, OPEN_QUOTE_ADVICE
from pipelines.sources.rest import EACH_ADVICE
from pipelines.stages import fingerprint

EVENTS: Final = Path("data/events")
ENTITIES: Final = Path("data/entities")
QUARANTINE: Final = Path("data/quarantine/ingest")
REPORT: Final = Path("reports/ingest.json")

_SPILL: Final = Path("data/.ingest.spill")

_ROWS_PER_GROUP: Final = 1 << 17
_ROWS_PER_INSERT: Final = 1 << 19
_MICROSECONDS_PER_DAY: Final = 86_400_000_000
_EXAMPLES: Final = 3
_MANY_DUPLICATES: Final = 0.05
_ANOTHER_EVENT: Final = "event_id of another event"
_MOST_TYPES: Final = 1000
# The start of a shown record, where its first value is a number with a decimal comma.
_COMMA: Final = re.compile(r'[^{]*\{"[^"]*": "\s*[-+\d.]*\d,\d+\s*"')
# Likewise a number beside something else, and one that is all digits.
_UNIT: Final = re.compile(r'[^{]*\{"[^"]*": "[^"\d]*[-+\d.,]*\d[^"\d]*"')
_DIGITS: Final = re.compile(r'[^{]*\{"[^"]*": "\d{9,}"')
_FORMAT: Final = '"%d.%m.%Y %H:%M:%S"'
_COMMA_ADVICE: Final = 'ingest.files.decimal: "," reads decimal commas'
_ADVICE: Final = {
    "missing event_type": "map it as {value: purchase} where all rows are of one type",
    UNKNOWN_TYPE: "say in mapping.event_type.values what they are; null leaves a type out",
    OPEN_QUOTE: OPEN_QUOTE_ADVICE,
    NOT_UTF8: NOT_UTF8_ADVICE,
    _ANOTHER_EVENT: "map event_id to a column with an id of its own for each event, or to null",
}

# An event's place in the order read: the number of its source, then of its row there.
_ROW_BITS: Final = 40

_CONTENT: Final = EVENT_SCHEMA.names[1:]  # all but event_id
_HASHED: Final = ", ".join(f"epoch_us({name})" if name == "ts" else name for name in _CONTENT)

# Statements are made of the schema's names alone.
_SIGN: Final = """
    SELECT * REPLACE (
        CASE WHEN event_type = 'purchase' AND quantity < 0 THEN 'refund' ELSE event_type END
            AS event_type,
        CASE WHEN event_type IN ('purchase', 'refund') THEN abs(quantity) ELSE quantity END
            AS quantity
    ) FROM batch
"""
_INSERT: Final = f"""
    INSERT INTO staged
    SELECT place, event_id IS NULL, coalesce(event_id, md5(CAST(json_array({_HASHED}) AS VARCHAR))),
        {", ".join(_CONTENT)}
    FROM ({_SIGN})
"""  # noqa: S608
_OF_ITEMS: Final = ITEM_SCHEMA.names[1:]  # all but item_id
_ITEMS: Final = """
    SELECT * REPLACE (CASE WHEN price >= 0 THEN price END AS price) FROM given
"""
_FILLED: Final = ", ".join(
    f"coalesce(staged.{name}, items.{name}) AS {name}" if name in _OF_ITEMS else f"staged.{name}"
    for name in EVENT_SCHEMA.names
)
_SORTED: Final = f"""
    SELECT {_FILLED} FROM staged LEFT JOIN items USING (item_id)
    ORDER BY staged.ts, staged.event_id
"""  # noqa: S608
_LACKING: Final = " OR ".join(
    f"staged.{name} IS NULL AND items.{name} IS NOT NULL" for name in _OF_ITEMS
)
_COUNT_FILLED: Final = f"""
    SELECT count(*) FROM staged JOIN items USING (item_id) WHERE {_LACKING}
"""  # noqa: S608

# Ids that occur once, nearly all, never reach the window function.
_FIND_REPEATS: Final = f"""
    CREATE TABLE repeats AS
    SELECT place, hashed, row_number() OVER events AS number,
        NOT hashed AND content <> first_value(content) OVER events AS differs
    FROM (SELECT *, hash({", ".join(_CONTENT)}) AS content FROM staged)
    SEMI JOIN (SELECT event_id FROM staged GROUP BY event_id HAVING count(*) > 1) USING (event_id)
    WINDOW events AS (PARTITION BY event_id ORDER BY ts, place)
    QUALIFY number > 1
"""  # noqa: S608
_COUNT_REPEATS: Final = """
    SELECT count(*) FILTER (NOT differs), count(*) FILTER (hashed) FROM repeats
"""
_SHOWN: Final = ", ".join(f"'{name}', {name}" for name in EVENT_SCHEMA.names)
_CONFLICTS: Final = f"""
    SELECT place, CAST(json_object({_SHOWN}) AS VARCHAR) AS record
    FROM staged SEMI JOIN (SELECT place FROM repeats WHERE differs) USING (place) ORDER BY place
"""  # noqa: S608
_NUMBER_REPEATS: Final = """
    UPDATE staged SET event_id = event_id || '-' || number
    FROM repeats WHERE repeats.place = staged.place AND repeats.hashed
"""
_DROP_REPEATS: Final = """
    DELETE FROM staged USING repeats
    WHERE repeats.place = staged.place AND NOT (repeats.hashed AND $keep)
"""
_SUM: Final = """
    SELECT count(*) AS events, count(DISTINCT user_id) AS users, min(ts) AS first, max(ts) AS last
    FROM staged
"""
_COUNT_KNOWN: Final = """
    SELECT count(DISTINCT user_id) FROM staged SEMI JOIN profiles USING (user_id)
"""
# 123.0 beside 123: a tool that keeps whole numbers as fractions wrote a part of the source.
_FIND_FRACTIONS: Final = """
    WITH ids AS (SELECT DISTINCT user_id FROM staged)
    SELECT count(*), min(user_id) FROM ids
    WHERE ends_with(user_id, '.0') AND regexp_full_match(user_id, '[0-9]+[.]0')
        AND left(user_id, -2) IN (SELECT user_id FROM ids)
"""
_COUNT_TYPES: Final = "SELECT event_type, count(*) FROM staged GROUP BY event_type"


@dataclass(kw_only=True)
class _Counts:
    """What became of the rows read."""

    rows: int = 0
    anonymous: int = 0
    ignored: int = 0
    after_until: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unknown_types: Counter[str] = field(default_factory=Counter)
    origins: dict[str, str] = field(default_factory=dict)  # column of the schema -> of the source
    source: Source = Source.FILES

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    @property
    def share(self) -> float:
        """Of the rows that were meant: what is left out on purpose would hide the rest."""
        return self.quarantined / self.meant if self.meant else 0.0

    @property
    def meant(self) -> int:
        """Rows of somebody and of a kind that is wanted."""
        return self.rows - self.anonymous - self.ignored

    def add(self, batch: Batch) -> None:
        self.rows += batch.rows
        self.anonymous += batch.anonymous
        self.ignored += batch.ignored
        self.add_refused(batch.quarantined)
        self.unknown_types.update(batch.unknown_types)
        if len(self.unknown_types) > 2 * _MOST_TYPES:  # of a column that holds no types at all
            self.unknown_types = Counter(dict(self.unknown_types.most_common(_MOST_TYPES)))

    def add_refused(self, refused: pa.Table) -> None:
        for entry in pc.value_counts(refused.column("reason")).to_pylist():
            self.reasons[entry["values"]] += entry["counts"]
            if entry["values"] not in self.examples:
                found = pc.equal(refused.column("reason"), entry["values"])
                row = refused.filter(found).slice(0, 1).to_pylist()[0]
                self.examples[entry["values"]] = (
                    f"{row['source']} row {row[ROW]}: {self._show(row['reason'], row['record'])}"
                )

    def _show(self, reason: str, record: str) -> str:
        """Return the start of a record, the value that the reason is about first."""
        values = json.loads(record)
        for word in reason.split():
            name = self.origins.get(word, word)
            if name in values:
                values = {name: values[name], **values}
        return _shorten(json.dumps(values, ensure_ascii=False))

    def _advise(self, reason: str) -> str:
        advice = _ADVICE.get(reason)
        name, example = reason.split(maxsplit=1)[0], self.examples[reason]
        if self.source is Source.FILES and "not a number" in reason and _COMMA.match(example):
            advice = _COMMA_ADVICE
        elif "not a number" in reason and _UNIT.match(example):
            advice = "leave out currencies and units"
        elif "cannot be read" in reason:
            key = f"{'mapping' if name == 'ts' else 'users_mapping'}.{name}"
            advice = f"say in {key}.format how it is written, such as {_FORMAT}"
            if _DIGITS.match(example):
                advice = f"say in {key}.unit whether it is in s, ms or us"
        elif NESTED in reason:
            advice = EACH_ADVICE if self.source is Source.REST else NESTED_ADVICE
        return f": {advice}" if advice else ""

    def explain(self) -> str:
        """Return the most frequent reasons, each with an example, and what to do where known."""
        types = ", ".join(
            f"{_shorten(kind, 40)} {count:,}"
            for kind, count in _by_frequency(self.unknown_types)[:5]
        )
        named = {UNKNOWN_TYPE: f": {types}"} if types else {}
        return "; ".join(
            f"{reason}{named.get(reason, '')} ({count:,}, e.g. {self.examples[reason]})"
            + self._advise(reason)
            for reason, count in _by_frequency(self.reasons)[:_EXAMPLES]
        )


class _Places:
    """Numbers events in the order read, so that a number tells the source and the row."""

    def __init__(self) -> None:
        self._sources: list[str] = []

    def number(self, batch: Batch) -> pa.Array:
        if self._sources[-1:] != [batch.source]:
            self._sources.append(batch.source)
        first = (len(self._sources) - 1) << _ROW_BITS
        return pc.add(batch.numbers, pa.scalar(first, pa.int64()))

    def quarantine(self, places: pa.Array, reason: str, records: pa.Array) -> pa.Table:
        """Return a quarantine table of events by their places."""
        sources = pc.take(
            pa.array(self._sources, pa.string()), pc.shift_right(places, pa.scalar(_ROW_BITS))
        )
        rows = pc.bit_wise_and(places, pa.scalar((1 << _ROW_BITS) - 1))
        reasons = pa.array([reason] * len(places), pa.string())
        return pa.table([sources, rows, reasons, records], schema=QUARANTINE_SCHEMA)


def run(params: Params, root: Path = Path()) -> str:
    """Ingest the source.

    Reads ``data/source.json`` and the source, which must be what is described there; writes
    ``data/events/day=YYYY-MM-DD/part-0.parquet`` (sorted by ts, event_id), ``data/entities``
    (users, items), ``data/quarantine/ingest`` and ``reports/ingest.json``.

    Args:
        params: all settings; the ``ingest`` section is used.
        root: the project's folder.

    Returns:
        One line for people.

    Raises:
        UserError: the source cannot be read or has changed, too many rows break the schema
            (these are then in the quarantine to look at), or no event is left.
    """
    found = read_json(root / fingerprint.OUTPUT)
    source = open_source(params.ingest, root, found)
    of_files = params.ingest.source is Source.FILES
    counts = _Counts(source=params.ingest.source, origins=_list_origins(params, Kind.EVENTS))
    of_entities = _list_origins(params, Kind.USERS) | _list_origins(params, Kind.ITEMS)
    entity_counts = _Counts(source=params.ingest.source, origins=of_entities)
    with ExitStack() as stack:
        connection = _open_store(root, stack)
        with (
            replace_directory(root / QUARANTINE) as folder,
            pq.ParquetWriter(
                folder / "part-0.parquet", QUARANTINE_SCHEMA, compression="zstd"
            ) as quarantine,
        ):
            batches = progress(source.read(Kind.EVENTS), "ingest", unit="batch")
            places = _Places()
            _store_events(batches, connection, quarantine, counts, places, params.ingest.until)
            keep = of_files and params.ingest.files.keep_repeats
            repeats = _resolve_repeats(connection, quarantine, counts, places, keep)
            users = _read_entities(source, Kind.USERS, quarantine, entity_counts)
            items = _read_entities(source, Kind.ITEMS, quarantine, entity_counts)
        # DVC would give the events of one content for another's, whenever that comes back.
        if fingerprint.take_digest(source.fingerprint_read()) != found.get("digest"):
            raise UserError(
                f"the source is not what {fingerprint.OUTPUT} describes: it changed before or while"
                " it was read; run dvc repro again, or forecart fingerprint and forecart ingest"
            )
        _check_share(counts, params.ingest.max_quarantine_share, "rows")
        _check_share(entity_counts, params.ingest.max_quarantine_share, "rows of users and items")

        sums = _summarise(connection)
        if not sums["events"]:
            raise UserError(_explain_nothing(counts, params))

        known_items = _last_rows(items, ITEM_SCHEMA)
        # A price below nothing would have good events set aside.
        connection.register("given", known_items)
        connection.execute(f"CREATE TABLE items AS {_ITEMS}")
        ((filled,),) = connection.execute(_COUNT_FILLED).fetchall()
        last_seen = _LastSeen()
        with replace_directory(root / EVENTS) as folder:
            _write_days(last_seen.watch(_sorted_events(connection)), folder)
        user_table = _last_rows(users, USER_SCHEMA)
        connection.register("profiles", user_table)
        ((with_profile,),) = connection.execute(_COUNT_KNOWN).fetchall()
        ((fractions, example),) = connection.execute(_FIND_FRACTIONS).fetchall()
    item_table = last_seen.items() if items is None else known_items
    with replace_directory(root / ENTITIES) as folder:
        write_table(folder / "users.parquet", user_table)
        write_table(folder / "items.parquet", item_table)
    report = {
        "rows": counts.rows,
        "anonymous": counts.anonymous,
        "ignored": counts.ignored,
        "after_until": counts.after_until,
        "quarantined": {
            "rows": counts.quarantined,
            "share": round(counts.share, 6),
            "reasons": dict(counts.reasons),
            "entities": dict(entity_counts.reasons),
        },
        "duplicates": repeats.dropped,
        "items": item_table.num_rows,
        **({"filled": filled} if filled else {}),
        **({} if users is None else {"with_profile": with_profile}),
        **sums,
    }
    write_json(root / REPORT, report)
    advice = _advise(repeats, counts, params) + _advise_ids(fractions, example)
    advice += source.tell_omissions()
    return _tell(report, advice + _advise_end(report["last_ts"], params, datetime.now(UTC)))


def _list_origins(params: Params, kind: Kind) -> dict[str, str]:
    """Return the source columns of the columns that are mapped."""
    sections = {
        Source.FILES: params.ingest.files,
        Source.DATABASE: params.ingest.database,
        Source.REST: params.ingest.rest,
    }
    section = sections.get(params.ingest.source)
    if section is None:
        return {}
    mapping, _ = base.find_mapping(section, kind)
    return {name: o.column for name, o in mapping.items() if o is not None and o.column is not None}


def _advise(repeats: _Repeats, counts: _Counts, params: Params) -> str:
    """Return what to do where many events without an id are dropped."""
    if repeats.dropped_hashed <= _MANY_DUPLICATES * counts.rows:
        return ""
    keep = " or set ingest.files.keep_repeats" if params.ingest.source is Source.FILES else ""
    return f" (many: if they are no mistake, map event_id{keep})"


def _advise_ids(twice: int, example: str | None) -> str:
    """Return what to do where the same shoppers seem to go by two ids."""
    if not twice:
        return ""
    have = f"{say_count(twice, 'shopper')} {'has' if twice == 1 else 'have'}"
    return f"; {have} a second id that ends in .0, such as {example}: write both alike"


def _advise_end(last_ts: str, params: Params, now: datetime) -> str:
    """Return what to do where the last day is not over: what is left of it counts as silence."""
    today = f"{now:%Y-%m-%d}"
    if params.ingest.until is not None or last_ts[:10] < today:
        return ""
    return f"; {last_ts[:10]} is not over yet: ingest.until: {today} leaves it out"


def _tell(report: dict[str, Any], advice: str) -> str:
    filled = f", {report['filled']:,} filled from the items table" if "filled" in report else ""
    known = f" ({report['with_profile']:,} with a profile)" if "with_profile" in report else ""
    return (
        f"{report['events']:,} events of {report['users']:,} users{known},"
        f" {report['first_ts'][:10]} to {report['last_ts'][:10]}, in {EVENTS};"
        f" of {report['rows']:,} rows {report['quarantined']['rows']:,} quarantined,"
        f" {report['anonymous']:,} anonymous, {report['duplicates']:,} duplicates{filled}{advice}"
    )


# -- reading ---------------------------------------------------------------------------------


def _open_store(root: Path, stack: ExitStack) -> Any:
    """Open the DuckDB that sorts; it and what it spills go when the stack closes."""
    import duckdb

    spill = stack.enter_context(spill_to(root / _SPILL))
    connection = stack.enter_context(
        duckdb.connect(config={"temp_directory": str(spill), "memory_limit": DUCKDB_MEMORY})
    )
    connection.execute("SET TimeZone = 'UTC'")
    columns = ", ".join(f"{column.name} {_sql_type(column.type)}" for column in EVENT_SCHEMA)
    connection.execute(f"CREATE TABLE staged (place BIGINT, hashed BOOLEAN, {columns})")
    return connection


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "TIMESTAMPTZ"
    return "DOUBLE" if pa.types.is_floating(kind) else "VARCHAR"


def _store_events(
    batches: Iterator[Batch],
    connection: Any,
    quarantine: pq.ParquetWriter,
    counts: _Counts,
    places: _Places,
    until: datetime | None,
) -> None:
    """Take in the source's events, numbered in the order read."""
    for events in _gather(_keep_events(batches, quarantine, counts, places, until)):
        connection.register("batch", events)
        connection.execute(_INSERT).fetchall()
        connection.unregister("batch")


def _keep_events(
    batches: Iterator[Batch],
    quarantine: pq.ParquetWriter,
    counts: _Counts,
    places: _Places,
    until: datetime | None,
) -> Iterator[pa.Table]:
    """Count batches, write what they refuse, and yield events before ``until``."""
    for batch in batches:
        counts.add(batch)
        quarantine.write_table(batch.quarantined)
        events = batch.table.append_column("place", places.number(batch))
        if until is not None:
            events = events.filter(pc.less(events.column("ts"), pa.scalar(until, TIMESTAMP)))
            counts.after_until += batch.table.num_rows - events.num_rows
        yield events


def _gather(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables: DuckDB is several times slower to insert less than a row group."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= _ROWS_PER_INSERT:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _read_entities(
    source: base.Source, kind: Kind, quarantine: pq.ParquetWriter, counts: _Counts
) -> pa.Table | None:
    """Read users or items whole; None where the source has none."""
    tables = []
    for batch in source.read(kind):
        counts.add(batch)
        quarantine.write_table(batch.quarantined)
        tables.append(batch.table)
    return pa.concat_tables(tables) if tables else None


def _check_share(counts: _Counts, limit: float, what: str) -> None:
    if counts.share > limit:
        raise UserError(
            f"{counts.quarantined:,} of {counts.meant:,} {what} ({counts.share:.1%}) break"
            f" the schema, more than ingest.max_quarantine_share ({limit:.1%}):"
            f" {counts.explain()}; all of them are in {QUARANTINE}"
        )


def _explain_nothing(counts: _Counts, params: Params) -> str:
    """Return why no event is left."""
    if not counts.rows:
        return "ingest: zero events: the source holds no rows"
    left_out = {
        "anonymous (no user id)": counts.anonymous,
        "ignored (event_type mapped to null)": counts.ignored,
        f"not before ingest.until {params.ingest.until}": counts.after_until,
        "quarantined": counts.quarantined,
    }
    why = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
    return f"zero events: of {counts.rows:,} rows {why}"


# -- sorting and writing ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Repeats:
    """How many events repeated another one and are dropped; how many of them had no id."""

    dropped: int
    dropped_hashed: int


def _resolve_repeats(
    connection: Any,
    quarantine: pq.ParquetWriter,
    counts: _Counts,
    places: _Places,
    keep: bool,
) -> _Repeats:
    """Drop or number events that repeat another one; refuse those that repeat its id alone."""
    connection.execute(_FIND_REPEATS)
    for batch in connection.sql(_CONFLICTS).to_arrow_reader(_ROWS_PER_GROUP):
        refused = places.quarantine(batch.column("place"), _ANOTHER_EVENT, batch.column("record"))
        counts.add_refused(refused)
        quarantine.write_table(refused)
    if keep:
        connection.execute(_NUMBER_REPEATS)
    alike, hashed = connection.execute(_COUNT_REPEATS).fetchone()
    connection.execute(_DROP_REPEATS, {"keep": keep}).fetchall()
    if keep:
        return _Repeats(dropped=alike - hashed, dropped_hashed=0)
    return _Repeats(dropped=alike, dropped_hashed=hashed)


def _summarise(connection: Any) -> dict[str, Any]:
    found = connection.sql(_SUM).to_arrow_table().to_pylist()[0]
    types = dict(connection.execute(_COUNT_TYPES).fetchall())
    return {
        "events": found["events"],
        "users": found["users"],
        "first_ts": _show_time(found["first"]),
        "last_ts": _show_time(found["last"]),
        "refunds": types.get(EventType.REFUND.value, 0),
        "event_types": {kind.value: types.get(kind.value, 0) for kind in EventType},
    }


def _sorted_events(connection: Any) -> Iterator[pa.Table]:
    """Yield events by ts, event_id; one day at a time or less."""
    reader = connection.sql(_SORTED).to_arrow_reader(_ROWS_PER_GROUP)
    for batch in reader:
        table = pa.Table.from_batches([batch]).cast(EVENT_SCHEMA)
        days = _days(table)
        edges = np.flatnonzero(np.diff(days)) + 1
        for start, end in itertools.pairwise([0, *edges.tolist(), table.num_rows]):
            yield table.slice(start, end - start)


def _days(table: pa.Table) -> np.ndarray:
    """Return the UTC day of each event, counted from 1970."""
    ts: np.ndarray = table.column("ts").cast(pa.int64()).to_numpy()
    return ts // _MICROSECONDS_PER_DAY


def _write_days(parts: Iterator[pa.Table], folder: Path) -> None:
    """Write sorted parts of days into one file a day."""
    for day, tables in itertools.groupby(parts, key=lambda part: int(_days(part.slice(0, 1))[0])):
        name = (date(1970, 1, 1) + timedelta(days=day)).isoformat()
        path = folder / f"day={name}" / "part-0.parquet"
        path.parent.mkdir()
        with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as writer:
            for table in _regroup(tables):
                writer.write_table(table)


def _regroup(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in groups of a fixed size, so that files do not depend on batches."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= _ROWS_PER_GROUP:
            whole = pa.concat_tables(held).combine_chunks()
            yield whole.slice(0, _ROWS_PER_GROUP)
            held = [whole.slice(_ROWS_PER_GROUP)]
            rows -= _ROWS_PER_GROUP
    if rows:
        yield pa.concat_tables(held).combine_chunks()


class _LastSeen:
    """Derives items from a stream of events in time order: what each event column said last."""

    def __init__(self) -> None:
        self._seen = ITEM_SCHEMA.empty_table()
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def watch(self, parts: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for part in parts:
            self._waiting.append(part.select(ITEM_SCHEMA.names))
            self._rows += part.num_rows
            if self._rows >= _ROWS_PER_GROUP:
                self._fold()
            yield part

    def items(self) -> pa.Table:
        """Return the items so far, by item_id."""
        self._fold()
        return self._seen.sort_by("item_id")

    def _fold(self) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else ITEM_SCHEMA.empty_table()
        self._waiting, self._rows = [], 0
        price = table.column("price")
        # A negative price is an adjustment in the books, not what the item costs.
        price = pc.if_else(pc.greater_equal(price, 0), price, None)
        table = table.set_column(table.schema.get_field_index("price"), "price", price)
        table = table.filter(pc.is_valid(table.column("item_id"))).cast(ITEM_SCHEMA)
        self._seen = _last_rows(pa.concat_tables([self._seen, table]), ITEM_SCHEMA)


def _last_rows(table: pa.Table | None, schema: pa.Schema) -> pa.Table:
    """Return one row per first column, sorted by it: of each other column the last non-null."""
    if table is None:
        return schema.empty_table()
    key, *others = schema.names
    # One thread: "last" is the last in the order of rows.
    grouped = table.group_by(key, use_threads=False).aggregate([(name, "last") for name in others])
    named = grouped.rename_columns([name.removesuffix("_last") for name in grouped.column_names])
    return named.select(schema.names).sort_by(key).cast(schema)


def _by_frequency(reasons: Counter[str]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _show_time(ts: datetime | None) -> str | None:
    return None if ts is None else ts.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
