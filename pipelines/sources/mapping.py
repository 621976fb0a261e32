"""From a source's own columns to the schema, row by row, with a reason for each row refused.

The mapping is compiled once per file into one DuckDB expression per column; rows then pass
through it in chunks, so that memory stays bounded and the order of rows is kept.

Rules:
    * Text is stripped of what is not seen at its ends; empty text is null. A whole number stored
      as a float (an id column that once held nulls) is written without its fraction.
    * Timestamps with an offset or zone keep it; others are local times of ``timezone``. A
      local time that happens twice (clocks going back) is the earlier of the two; one that
      never happens (clocks going forward) is moved forward by the gap.
    * ``values`` of event_type is the complete list; elsewhere what is not listed stays. They
      are compared with the text of the source, numbers too, and null means nothing is given.
    * NaN is null; an infinite number is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import ColumnMapping
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES, MAX_ID_LENGTH, MAX_QUERY_LENGTH
from pipelines.sources.base import (
    NESTED,
    NESTED_ADVICE,
    ROW,
    SCHEMAS,
    UNKNOWN_TYPE,
    Batch,
    Kind,
    Mapping,
    choose_origins,
    needed_columns,
    quarantine,
)

# A timestamp outside is damage or a wrong unit (milliseconds read as seconds are far in the
# future, seconds read as milliseconds are in January 1970), and each wrong day would become
# a partition of its own.
_FIRST_TS: Final = "1971-01-01 00:00:00+00"
_END_TS: Final = "2200-01-01 00:00:00+00"

# DuckDB gives each thread a batch at a time.
_ROWS_PER_TASK: Final = 1 << 14
_MOST_PIECES: Final = 1000

_ANONYMOUS: Final = "anonymous"
_IGNORED: Final = "ignored"
# Digits in groups of three, perhaps with a decimal comma.
_GROUPED: Final = r"[+-]?\d{1,3}(\.\d{3})+(,\d*)?"
# What is not seen at the ends of text: white space of any script, marks without width, controls;
# ``strip_unseen`` does the same to the service's.
_UNSEEN: Final = r"^[\pZ\p{Cc}\p{Cf}]+|[\pZ\p{Cc}\p{Cf}]+$"
_MICROSECONDS: Final = {"s": 1e6, "ms": 1e3, "us": 1.0}

# ISO text without an offset or zone: nothing but minutes and seconds follows the hour.
_LOCAL: Final = r"[^:]*[\d:.]*"


def connect() -> duckdb.DuckDBPyConnection:
    """Open a DuckDB in memory that reads and shows times in UTC."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'").fetchall()
    return connection


class Mapper:
    """Turns chunks of one file into batches of one table.

    Args:
        kind: the table to make.
        mapping: column of the schema -> origin; columns without an entry are taken from the
            source column of the same name where there is one, else they are null.
        source: the file's name, for messages and the quarantine.
        columns: the file's columns with their types.
        connection: compiles and runs the mapping.
        key: the setting that holds the mapping, for messages.
        decimal: what stands before the fraction of a number in text, a point or a comma.

    Raises:
        UserError: a mapped or required column is missing, or an option does not suit it.
    """

    def __init__(
        self,
        kind: Kind,
        mapping: Mapping,
        source: str,
        columns: pa.Schema,
        connection: duckdb.DuckDBPyConnection,
        key: str,
        decimal: str = ".",
    ) -> None:
        """Compile the mapping."""
        self._schema = SCHEMAS[kind]
        self._kind = kind
        self._source = source
        self._connection = connection
        self._key = key
        self._decimal = decimal
        self._origins = choose_origins(kind, mapping, source, columns.names, key)
        self.columns = needed_columns(self._origins)
        for name in self.columns:
            if columns.names.count(name) > 1:
                raise UserError(f"{source}: there are two columns {name}")
        self._types = {name: columns.field(name).type for name in self.columns}
        for name, kind_ in self._types.items():
            if pa.types.is_nested(kind_):
                raise UserError(f"{source}: column {name} {NESTED}; {NESTED_ADVICE}")
        self._query = self._compile()
        self._check_options()

    def convert(self, chunk: pa.Table) -> Batch:
        """Convert a chunk.

        Args:
            chunk: ``row`` (int64) and ``self.columns``.
        """
        # Positions for names: DuckDB's names know no case, a source's may.
        raw = chunk.select([ROW, *self.columns]).rename_columns(
            [ROW, *(f"c{i}" for i in range(len(self.columns)))]
        )
        tasks = raw.combine_chunks().to_batches(_ROWS_PER_TASK)
        try:
            self._connection.register("raw", pa.Table.from_batches(tasks, raw.schema))
            result = _restore_order(self._connection.sql(self._query).to_arrow_table())
        except duckdb.NotImplementedException:
            types = ", ".join(f"{name} ({kind})" for name, kind in self._types.items())
            raise UserError(
                f"{self._source}: a column is of a type that cannot be read: {types}"
            ) from None
        self._connection.unregister("raw")

        reason = result.column("reason")
        refused = result.filter(pc.is_valid(reason))
        kept = result if refused.num_rows == 0 else result.filter(pc.is_null(reason))
        anonymous = _count(refused, _ANONYMOUS)
        ignored = _count(refused, _IGNORED)
        if anonymous or ignored:
            aside = pc.is_in(refused.column("reason"), pa.array([_ANONYMOUS, _IGNORED]))
            refused = refused.filter(pc.invert(aside))
        return Batch(
            source=self._source,
            numbers=kept.column(ROW),
            table=kept.select(self._schema.names).cast(self._schema),
            quarantined=quarantine(
                self._source,
                refused.column(ROW),
                refused.column("reason"),
                refused.column("record"),
            ),
            rows=chunk.num_rows,
            anonymous=anonymous,
            ignored=ignored,
            unknown_types=self._count_unknown(chunk, refused),
        )

    def _count_unknown(self, chunk: pa.Table, refused: pa.Table) -> dict[str, int]:
        """Return how often which event type is refused as unknown."""
        unknown = refused.filter(pc.equal(refused.column("reason"), UNKNOWN_TYPE)).column(ROW)
        if not unknown.length():
            return {}
        column = self._origins["event_type"].column
        if column is None:
            return {str(self._origins["event_type"].value): unknown.length()}
        found = chunk.filter(pc.is_in(chunk.column(ROW), unknown)).column(column)
        names = pc.utf8_trim_whitespace(found.cast(pa.string()))
        return {entry["values"]: entry["counts"] for entry in pc.value_counts(names).to_pylist()}

    def _check_options(self) -> None:
        """Try the options of time, so that a mistake shows before any row is read."""
        for name, origin in self._origins.items():
            if pa.types.is_timestamp(self._schema.field(name).type):
                self._check_time(f"{self._key}.{name}", origin)

    def _check_time(self, key: str, origin: ColumnMapping) -> None:
        try:
            self._connection.execute(
                "SELECT CAST(timezone($zone, TIMESTAMP '2000-01-01') AS VARCHAR)",
                {"zone": origin.timezone},
            ).fetchall()
        except duckdb.Error:
            raise UserError(f"{key}.timezone: no time zone {origin.timezone!r}") from None
        if origin.format is not None:
            try:
                self._connection.execute(
                    "SELECT CAST(try_strptime('', $format) AS VARCHAR)", {"format": origin.format}
                ).fetchall()
            except duckdb.Error:
                raise UserError(f"{key}.format: not a strptime format: {origin.format!r}") from None

    @property
    def complete(self) -> bool:
        """Whether every column of the schema has an origin."""
        return len(self._origins) == len(self._schema)

    # -- compilation ---------------------------------------------------------------------

    def _compile(self) -> str:
        """Return the query over ``raw``: schema columns, row, reason (null = fine), record."""
        values: list[str] = []
        for field in self._schema:
            value = self._only(field.name, self._value(field))
            values.append(f"CAST({value} AS {_sql_type(field.type)}) AS v_{field.name}")
            values.append(f"({self._only(field.name, self._given(field.name))}) AS g_{field.name}")
        columns = ", ".join(f"v_{name} AS {name}" for name in self._schema.names)
        record = ", ".join(f"{_literal(name)}, c{index}" for index, name in enumerate(self.columns))
        raw = ", ".join([ROW, *(f"c{index}" for index in range(len(self.columns)))])
        # Made of the schema's names, positions and quoted literals alone.
        mapped = f"(SELECT {raw}, {', '.join(values)} FROM raw)"  # noqa: S608
        judged = f"(SELECT *, {self._reason()} AS reason FROM {mapped})"  # noqa: S608
        shown = f"CASE WHEN reason IS NOT NULL THEN CAST(json_object({record}) AS VARCHAR) END"
        return f"SELECT {columns}, {ROW}, reason, {shown} AS record FROM {judged}"  # noqa: S608

    def _value(self, field: pa.Field) -> str:
        if field.name not in self._origins:
            return "NULL"
        if pa.types.is_timestamp(field.type):
            return self._time(field.name)
        if pa.types.is_floating(field.type):
            return self._number(field.name)
        return self._text_value(field.name)

    def _column(self, name: str) -> tuple[str, pa.DataType] | None:
        """Return a field's source column as SQL and its type; None for a constant."""
        column = self._origins[name].column
        if column is None:
            return None
        return f"c{self.columns.index(column)}", self._types[column]

    def _text(self, name: str) -> str:
        """Return the source value of a field as stripped text, empty as null."""
        column = self._column(name)
        if column is None:
            value = self._origins[name].value
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            return _literal(str(value))
        sql, kind = column
        if pa.types.is_floating(kind):
            # 2^53: beyond it a double no longer tells whole numbers apart.
            return (
                f"CASE WHEN isnan({sql}) THEN NULL"
                f" WHEN {sql} = trunc({sql}) AND abs({sql}) < 9007199254740992"
                f" THEN CAST(CAST({sql} AS BIGINT) AS VARCHAR) ELSE CAST({sql} AS VARCHAR) END"
            )
        text = f"CAST({sql} AS VARCHAR)"
        if pa.types.is_decimal(kind):
            return f"rtrim(rtrim({text}, '0'), '.')" if kind.scale > 0 else text
        stripped = f"regexp_replace({text}, {_literal(_UNSEEN)}, '', 'g')"
        # Stripping is slow, and the comparisons show that most text needs none.
        return (
            f"CASE WHEN {text} >= '!' AND {text} < chr(127) AND {text}[-1] BETWEEN '!' AND '~'"
            f" THEN {text} ELSE nullif({stripped}, '') END"
        )

    def _text_value(self, name: str) -> str:
        """Return the text of a field, ``values`` put in."""
        return self._replace(name, self._text(name), _literal)

    def _replace(self, name: str, otherwise: str, convert: Callable[[str | None], str]) -> str:
        """Return a field's entry of ``values`` where it has one, else ``otherwise``."""
        values = self._origins[name].values
        if values is None:
            return otherwise
        if name == "event_type":
            otherwise = "NULL"
        cases = " ".join(f"WHEN {_literal(k)} THEN {convert(v)}" for k, v in values.items())
        return f"CASE {self._text(name)} {cases} ELSE {otherwise} END" if cases else otherwise

    def _number(self, name: str) -> str:
        column = self._column(name)
        if column is None or _is_text(column[1]):
            number = self._number_of_text(self._text(name))
        else:
            number = f"TRY_CAST({column[0]} AS DOUBLE)"
        number = self._replace(name, number, lambda v: f"TRY_CAST({_literal(v)} AS DOUBLE)")
        # The value is kept where it is infinite, so that the row can be refused for it.
        return f"CASE WHEN isnan({number}) THEN NULL ELSE {number} END"

    def _number_of_text(self, text: str) -> str:
        if self._decimal == ".":
            return f"TRY_CAST({text} AS DOUBLE)"
        # A point that groups no digits is another country's: refused, rather than read as none.
        plain = f"TRY_CAST(replace(replace({text}, '.', ''), ',', '.') AS DOUBLE)"
        grouped = f"regexp_full_match({text}, {_literal(_GROUPED)})"
        return f"CASE WHEN NOT contains({text}, '.') OR {grouped} THEN {plain} END"

    def _time(self, name: str) -> str:
        origin = self._origins[name]
        column = self._column(name)
        if column is None or _is_text(column[1]):
            return self._time_of_text(name, origin)
        sql, kind = column
        if pa.types.is_null(kind):  # how pandas writes a column of nulls
            return "NULL"
        if pa.types.is_timestamp(kind):
            if kind.tz is not None:
                return f"CAST({sql} AS TIMESTAMPTZ)"
            return _local_time(f"TRY_CAST({sql} AS TIMESTAMP)", origin.timezone)
        if pa.types.is_date(kind):
            return _local_time(f"TRY_CAST({sql} AS TIMESTAMP)", origin.timezone)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            if origin.unit is None:
                raise UserError(
                    f"{self._source}: column {origin.column} holds numbers, not times;"
                    f" say in {self._key}.{name}.unit whether they are s, ms or us"
                )
            return _epoch_time(f"TRY_CAST({sql} AS DOUBLE)", origin.unit)
        raise UserError(
            f"{self._source}: column {origin.column} is of type {kind}, which holds no time"
        )

    def _time_of_text(self, name: str, origin: ColumnMapping) -> str:
        text = self._text_value(name)
        if origin.unit is not None:
            return _epoch_time(self._number_of_text(text), origin.unit)
        if origin.format is not None:
            parsed = f"try_strptime({text}, {_literal(origin.format)})"
            zoned = "%z" in origin.format or "%Z" in origin.format
            return parsed if zoned else _local_time(parsed, origin.timezone)
        # Some write a blank before the offset, which DuckDB does not read.
        close = f"regexp_replace({text}, ' +([+-][0-9:]+)$', '\\1')"
        apart = f"contains({text}, ' +') OR contains({text}, ' -')"
        instant = f"TRY_CAST(CASE WHEN {apart} THEN {close} ELSE {text} END AS TIMESTAMPTZ)"
        if origin.timezone == "UTC":
            return instant
        local = _local_time(f"TRY_CAST({text} AS TIMESTAMP)", origin.timezone)
        # DuckDB's cast to TIMESTAMP ignores whatever follows a time.
        bare = f"regexp_full_match({text}, {_literal(_LOCAL)})"
        return f"CASE WHEN {bare} THEN {local} ELSE {instant} END"

    def _given(self, name: str) -> str:
        """Return whether the source gives anything for a field."""
        if name not in self._origins:
            return "FALSE"
        if name == "event_type":
            return f"({self._text(name)}) IS NOT NULL"
        column = self._column(name)
        if column is None or _is_text(column[1]) or self._origins[name].values is not None:
            return f"({self._text_value(name)}) IS NOT NULL"
        sql, kind = column
        number = f" AND NOT isnan({sql})" if pa.types.is_floating(kind) else ""
        return f"{sql} IS NOT NULL{number}"

    def _only(self, name: str, value: str) -> str:
        """Return a value of a field, null for event types that it is not for."""
        origin = self._origins.get(name)
        if origin is None or origin.only is None:
            return value
        types = ", ".join(_literal(kind) for kind in origin.only)
        return f"CASE WHEN ({self._text_value('event_type')}) IN ({types}) THEN {value} END"

    def _reason(self) -> str:
        """Return the first reason why a row is refused; null where there is none."""
        checks: list[tuple[str, str]] = []
        if self._kind is Kind.EVENTS:
            checks += self._event_checks()
        for field in self._schema:
            name = field.name
            value = f"v_{name}"
            if not field.nullable:
                checks.append((f"NOT g_{name}", f"missing {name}"))
            if name not in self._origins:
                continue
            if pa.types.is_timestamp(field.type):
                checks.append((f"g_{name} AND v_{name} IS NULL", f"{name} cannot be read"))
                checks.append(
                    (
                        f"v_{name} < TIMESTAMPTZ '{_FIRST_TS}'"
                        f" OR v_{name} >= TIMESTAMPTZ '{_END_TS}'",
                        f"{name} is not between 1971 and 2199",
                    )
                )
            elif pa.types.is_floating(field.type):
                bad = f"g_{name} AND v_{name} IS NULL AND NOT {self._is_nan(name)}"
                checks.append((f"({bad}) OR isinf({value})", f"{name} is not a number"))
            else:
                limit = MAX_QUERY_LENGTH if name == "query" else MAX_ID_LENGTH
                checks.append(
                    (f"length({value}) > {limit}", f"{name} is longer than {limit} characters")
                )
        cases = " ".join(f"WHEN {test} THEN {_literal(reason)}" for test, reason in checks)
        return f"CASE {cases} END"

    def _event_checks(self) -> list[tuple[str, str]]:
        checks = []
        origin = self._origins["event_type"]
        left_out = [k for k, v in (origin.values or {}).items() if v is None]
        if left_out:
            names = ", ".join(_literal(name) for name in left_out)
            checks.append((f"({self._text('event_type')}) IN ({names})", _IGNORED))
        types = ", ".join(_literal(kind) for kind in EVENT_TYPES)
        checks.append(("v_user_id IS NULL", _ANONYMOUS))
        checks.append(
            (
                f"g_event_type AND (v_event_type IS NULL OR v_event_type NOT IN ({types}))",
                UNKNOWN_TYPE,
            )
        )
        return checks

    def _is_nan(self, name: str) -> str:
        # Text 'nan' is how some tools write a null; a NaN of a float column is not "given".
        return f"coalesce(isnan(TRY_CAST({self._text_value(name)} AS DOUBLE)), FALSE)"


def _restore_order(result: pa.Table) -> pa.Table:
    """Return rows by their numbers: DuckDB's threads keep the order within their tasks alone."""
    numbers = result.column(ROW).to_numpy()
    steps = np.diff(numbers)
    if (steps > 0).all():
        return result
    edges = np.array([0, *(np.flatnonzero(steps != 1) + 1), len(numbers)])
    if len(edges) > _MOST_PIECES:
        return result.sort_by(ROW)
    # Pieces of rows that follow each other are moved without a copy.
    order = np.argsort(numbers[edges[:-1]])
    return pa.concat_tables([result.slice(edges[i], edges[i + 1] - edges[i]) for i in order])


def _count(refused: pa.Table, reason: str) -> int:
    total: int | None = pc.sum(pc.equal(refused.column("reason"), reason)).as_py()
    return total or 0


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "TIMESTAMPTZ"
    return "DOUBLE" if pa.types.is_floating(kind) else "VARCHAR"


def _literal(text: str | None) -> str:
    """Return text as an SQL literal."""
    return "NULL" if text is None else "'" + text.replace("'", "''") + "'"


def _epoch_time(number: str, unit: str) -> str:
    microseconds = f"({number}) * {_MICROSECONDS[unit]}"
    # Out of the range of a timestamp, but inside that of an integer: refused by the range check.
    bounded = f"greatest(least({microseconds}, 9e15), -9e15)"
    return (
        f"CASE WHEN isfinite({number})"
        f" THEN timezone('UTC', make_timestamp(CAST(round({bounded}) AS BIGINT))) END"
    )


def _local_time(timestamp: str, zone: str) -> str:
    """Return a local timestamp as an instant; of two, the earlier."""
    if zone == "UTC":
        return f"timezone('UTC', {timestamp})"
    name = _literal(zone)
    # ICU takes the later of two; an hour before is the earlier one if it reads the same.
    instant = f"timezone({name}, {timestamp})"
    earlier = f"({instant} - INTERVAL 1 HOUR)"
    return f"CASE WHEN timezone({name}, {earlier}) = {timestamp} THEN {earlier} ELSE {instant} END"
