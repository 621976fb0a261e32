"""What a source of events is, so that stages know none by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import pyarrow as pa

from pipelines.config import ColumnMapping, Mapped
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, ITEM_SCHEMA, USER_SCHEMA


class Kind(StrEnum):
    """The tables that a source may hold."""

    EVENTS = "events"
    USERS = "users"
    ITEMS = "items"


def _nullable(schema: pa.Schema, name: str) -> pa.Schema:
    index = schema.get_field_index(name)
    return schema.set(index, schema.field(index).with_nullable(True))


# A source leaves event_id empty where it has none; the ingest stage then takes a content hash,
# so that the rule is the same for every source.
SCHEMAS: Final[dict[Kind, pa.Schema]] = {
    Kind.EVENTS: _nullable(EVENT_SCHEMA, "event_id"),
    Kind.USERS: USER_SCHEMA,
    Kind.ITEMS: ITEM_SCHEMA,
}

ROW: Final = "row"
UNKNOWN_TYPE: Final = "unknown event_type"
NESTED: Final = "holds a list or an object"
NESTED_ADVICE: Final = "write a row for each entry, with a column for each of its values"

# Rows that break the schema. `row` counts the rows of `source` from 1, headers not included.
QUARANTINE_SCHEMA: Final = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("record", pa.string(), nullable=False),
    ]
)


# Column of the schema -> where it comes from; None for nowhere.
Mapping: TypeAlias = dict[str, ColumnMapping | None]
Column: TypeAlias = pa.Array | pa.ChunkedArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of one table of a source.

    Attributes:
        source: the file or table that they are of.
        table: rows that keep to the schema of their kind (``SCHEMAS``).
        numbers: of these rows, counted as in the quarantine; rising within a source.
        quarantined: rows that break it (``QUARANTINE_SCHEMA``).
        rows: rows read, those set aside included.
        anonymous: rows without a user id. They are no damage, and no use either.
        ignored: rows of an event type that the mapping leaves out on purpose.
        unknown_types: how many of the rows refused for their event type hold which.
    """

    source: str
    table: pa.Table
    numbers: Column
    quarantined: pa.Table
    rows: int
    anonymous: int = 0
    ignored: int = 0
    unknown_types: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Where events come from."""

    def fingerprint(self) -> dict[str, Any]:
        """Describe the content as JSON that changes when, and only when, the content does.

        Light: reads bytes or metadata and imports no data frame library.

        Raises:
            UserError: there is nothing to read.
        """
        ...

    def read(self, kind: Kind) -> Iterator[Batch]:
        """Read a table in a stable order and bounded memory; nothing where it is not given.

        Raises:
            UserError: naming the file, and the row or column.
        """
        ...

    def fingerprint_read(self) -> dict[str, Any]:
        """Describe, as ``fingerprint`` does, what every kind held while it was read."""
        ...

    def tell_omissions(self) -> str:
        """Say, once all is read, what was there and was not; "" for nothing."""
        ...


def quarantine(source: str, rows: Column, reasons: Column, records: Column) -> pa.Table:
    """Return a quarantine table of one source."""
    sources = pa.array([source] * len(rows), pa.string())
    return pa.table([sources, rows, reasons, records], names=QUARANTINE_SCHEMA.names).cast(
        QUARANTINE_SCHEMA
    )


def find_mapping(params: Mapped, kind: Kind) -> tuple[Mapping, str]:
    """Return a table's mapping, and the name of the setting that holds it."""
    name = "mapping" if kind is Kind.EVENTS else f"{kind}_mapping"
    return getattr(params, name), name


def choose_origins(
    kind: Kind, mapping: Mapping, source: str, found: list[str], key: str
) -> dict[str, ColumnMapping]:
    """Return where each column of a table comes from; columns without an origin are left out.

    Args:
        kind: the table.
        mapping: the user's mapping.
        source: the file's name.
        found: the file's columns.
        key: the setting that holds the mapping, for messages.

    Raises:
        UserError: a column that is mapped or required is not in the file, or is there in
            another case only.
    """
    origins: dict[str, ColumnMapping] = {}
    mapped = {origin.column for origin in mapping.values() if origin is not None}
    unmapped = {name.casefold(): name for name in reversed(found) if name not in mapped}
    for column in SCHEMAS[kind]:
        name = column.name
        origin = mapping.get(name)
        if name in mapping and origin is None:
            continue
        if origin is not None:
            if origin.column is not None and origin.column not in found:
                raise UserError(
                    f"{source}: no column {origin.column} ({key}.{name}); found {', '.join(found)}"
                )
            origins[name] = origin
        elif name in found:
            origins[name] = ColumnMapping(column=name)
        elif name in unmapped:
            other = unmapped[name]
            advice = f"set {key}.{name}: {other}"
            if column.nullable or name == "event_id":
                advice += ", or null to leave it out"
            raise UserError(f"{source}: column {other} differs from {name} by its case; {advice}")
        elif not column.nullable:
            raise UserError(
                f"{source}: no column {name}; map it in {key}.{name}; found {', '.join(found)}"
            )
    return origins


def needed_columns(origins: dict[str, ColumnMapping]) -> list[str]:
    """Return the columns of the source that are read, each once."""
    return list(dict.fromkeys(o.column for o in origins.values() if o.column is not None))


class SeenKeys:
    """Keeps account of needed JSON keys that nothing has held so far.

    Attributes:
        wanted: keys that are read where they occur.
        missing: those that must occur, and have not yet.
        found: keys that occurred.
    """

    def __init__(self, kind: Kind, mapping: Mapping, source: str, entry: str) -> None:
        """Look the keys up.

        Args:
            kind: the table.
            mapping: the user's mapping.
            source: the file's name, for messages.
            entry: what holds keys there, for messages.
        """
        names = set(SCHEMAS[kind].names) - set(mapping)
        mapped = {m.column for m in mapping.values() if m is not None and m.column is not None}
        required = {name for name in names if not SCHEMAS[kind].field(name).nullable}
        self.wanted = sorted(mapped | names)
        self.missing = mapped | required
        self.found: set[str] = set()
        self._source = source
        self._entry = entry

    def see(self, keys: Iterable[str]) -> None:
        """Note keys of some lines."""
        self.found.update(keys)
        self.missing -= self.found

    def check(self) -> None:
        """Fail when a needed key never came though others did.

        Raises:
            UserError: naming the keys, and those found.
        """
        if self.missing and self.found:
            raise UserError(
                f"{self._source}: no column {', '.join(sorted(self.missing))} in any"
                f" {self._entry}; found {', '.join(sorted(self.found))}"
            )


class Refused(NamedTuple):
    """What gives no row, and goes to the quarantine."""

    row: int
    reason: str
    record: str  # a JSON object


def add_refused(batch: Batch, refused: list[Refused]) -> Batch:
    """Return a batch with what gave no row, in the order of the rows."""
    if not refused:
        return batch
    added = quarantine(
        batch.source,
        pa.array([r.row for r in refused], pa.int64()),
        pa.array([r.reason for r in refused], pa.string()),
        pa.array([r.record for r in refused], pa.string()),
    )
    both = pa.concat_tables([batch.quarantined, added]).sort_by(ROW)
    return replace(batch, quarantined=both, rows=batch.rows + len(refused))
