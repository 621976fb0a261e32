"""Events from tables of an SQL database, through SQLAlchemy: the collecting service's, or any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipelines.address import DEFAULT_STORE, STORE_VARIABLE, hide_login, parse_address
from pipelines.config import ColumnMapping, Database
from pipelines.errors import UserError
from pipelines.events import USER_SCHEMA
from pipelines.sources.base import (
    ROW,
    SCHEMAS,
    Batch,
    Kind,
    Mapping,
    choose_origins,
    find_mapping,
    needed_columns,
)
from pipelines.sources.content import Content
from pipelines.sources.text import to_text

# Where the collecting service keeps what the shop knows of its users.
PROFILES: Final = "profiles"

# The primary key of the collecting service's tables, which tells the order of arrival.
_NUMBER: Final = "number"

_BOOLEANS: Final = {0: False, 1: True}

_POSTGRES: Final = "postgresql"
_SQLITE: Final = "sqlite"

# Stands for numbers of any precision. They are passed on as text: a double would keep the first
# fifteen digits of an id.
_DECIMAL: Final = pa.decimal128(38)

_SECTION: Final = "ingest.database"
_ROWS_PER_CHUNK: Final = 1 << 16


class DatabaseSource:
    """Events, and perhaps users and items, from tables.

    Rows are read in the order of the primary key, or of what is read where there is none. What
    changes is noticed by a hash over all that is read. Tables of the collecting service, whose
    rows are added and deleted but never changed, are described by how many there are and by the
    extremes of their numbers instead: that is quick however many there are.

    A value that does not suit the type of its column is text, as it would be in a file: where it
    cannot be read, its row goes to the quarantine.
    """

    def __init__(
        self, params: Database, root: Path = Path(), found: dict[str, Any] | None = None
    ) -> None:
        """Remember where to look; nothing is opened yet.

        Args:
            params: the ``ingest.database`` section.
            root: folder that a relative SQLite path starts from.
            found: the fingerprint. The service's events that came after it are not read.
        """
        self._params = params
        self._root = root
        self._found = found or {}
        self._read: dict[str, Any] = {}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Source``: a hash of each table, or its number of rows and their extremes."""
        tables: dict[str, Any] = {}
        with self._connect() as (engine, connection):
            for kind in Kind:
                name = self._find_name(kind, engine)
                if name is None:
                    continue
                table = self._reflect(engine, name)
                if _is_numbered(table, kind):
                    tables[kind.value] = {"table": name, "found": _count(connection, table)}
                else:
                    columns = self._needed(kind, table)
                    content = Content()
                    for rows in _stream(connection, table, columns):
                        content.add(rows)
                    tables[kind.value] = {"table": name, **content.describe()}
        return {"source": "database", **tables}

    def read(self, kind: Kind) -> Iterator[Batch]:
        """See ``Source``."""
        from pipelines.sources.mapping import Mapper, connect

        with self._connect() as (engine, connection):
            name = self._find_name(kind, engine)
            if name is None:
                return
            table = self._reflect(engine, name)
            untyped = _is_untyped(connection)
            schema = pa.schema([(c.name, _arrow_type(c.type, untyped)) for c in table.columns])
            mapping, key = self._complete(kind, schema)
            mapping_connection = connect()

            @cache
            def map_text(*names: str) -> Mapper:
                """Return the mapper of chunks in which these columns are text."""
                kinds = [pa.string() if f.name in names else f.type for f in schema]
                given = pa.schema(list(zip(schema.names, kinds, strict=True)))
                return Mapper(kind, mapping, name, given, mapping_connection, key)

            columns = map_text().columns
            found = self._found.get(kind.value, {})
            described = found.get("table") == name and "found" in found
            numbered = described and _is_numbered(table, kind)
            last = found["found"][2] or 0 if numbered and kind is Kind.EVENTS else None
            content = Content()
            first = 1
            for rows in _stream(connection, table, columns, last):
                content.add(rows)
                chunk = pa.table(
                    [
                        _to_arrow([row[i] for row in rows], schema.field(column).type)
                        for i, column in enumerate(columns)
                    ],
                    names=columns,
                )
                other = [f.name for f in chunk.schema if f.type != schema.field(f.name).type]
                numbers = pa.array(range(first, first + len(rows)), pa.int64())
                yield map_text(*other).convert(chunk.add_column(0, ROW, numbers))
                first += len(rows)
            # The service goes on collecting meanwhile: that is no damage, and the next run's.
            self._read[kind.value] = found if numbered else {"table": name, **content.describe()}

    def fingerprint_read(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"source": "database", **self._read}

    def tell_omissions(self) -> str:
        """See ``Source``: what is not asked for is none."""
        return ""

    def _name(self, kind: Kind) -> str | None:
        names = {
            Kind.EVENTS: self._params.events,
            Kind.USERS: self._params.users,
            Kind.ITEMS: self._params.items,
        }
        return names[kind]

    def _find_name(self, kind: Kind, engine: Any) -> str | None:
        """Return the table of a kind; profiles that the service keeps are found unasked."""
        name = self._name(kind)
        if name is None and kind is Kind.USERS:
            from sqlalchemy import inspect

            found = inspect(engine)
            if found.has_table(PROFILES):
                columns = {column["name"] for column in found.get_columns(PROFILES)}
                return PROFILES if columns >= set(USER_SCHEMA.names) else None
        return name

    def _needed(self, kind: Kind, table: Any) -> list[str]:
        """Return the columns that are read."""
        names = [column.name for column in table.columns]
        mapping, key = self._find_mapping(kind)
        return needed_columns(choose_origins(kind, mapping, table.name, names, key))

    def _find_mapping(self, kind: Kind) -> tuple[Mapping, str]:
        mapping, name = find_mapping(self._params, kind)
        return mapping, f"{_SECTION}.{name}"

    def _complete(self, kind: Kind, schema: pa.Schema) -> tuple[Mapping, str]:
        """Read an unmapped time that is a whole number as microseconds, as the service stores."""
        found, key = self._find_mapping(kind)
        mapping = dict(found)
        for name in ("ts", "signup_ts"):
            whole = name in schema.names and pa.types.is_integer(schema.field(name).type)
            if name not in mapping and whole and (kind, name) != (Kind.ITEMS, name):
                mapping[name] = ColumnMapping(column=name, unit="us")
        return mapping, key

    def _connect(self) -> Any:
        """Open a connection for a with block; errors of the database are told in one line."""
        from contextlib import contextmanager

        from sqlalchemy import create_engine
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

        text = self._params.url or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE
        setting = f"{_SECTION}.url" if self._params.url else STORE_VARIABLE
        try:
            url = parse_address(text)
            if url.get_backend_name() == "sqlite" and url.database:
                path = self._root / url.database
                if not path.exists():
                    change = "correct" if self._params.url else "set"
                    raise UserError(f"{path}: no such database; {change} {setting}")
                url = url.set(database=str(path))
            engine = create_engine(url)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise UserError(f"{setting}: {error}") from None

        address = hide_login(url.render_as_string(hide_password=False))

        @contextmanager
        def opened() -> Iterator[Any]:
            try:
                with _open(engine, address) as connection:
                    yield engine, connection
            except SQLAlchemyError as error:
                line = str(getattr(error, "orig", None) or error).splitlines()[0]
                raise UserError(f"{address}: {line}") from None
            finally:
                engine.dispose()

        return opened()

    def _reflect(self, engine: Any, name: str) -> Any:
        from sqlalchemy import MetaData, Table
        from sqlalchemy.exc import NoSuchTableError

        schema, _, table = name.rpartition(".")
        try:
            return Table(table, MetaData(), schema=schema or None, autoload_with=engine)
        except NoSuchTableError:
            raise UserError(f"{_SECTION}: there is no table {name}") from None


def _open(engine: Any, address: str) -> Any:
    """Open a connection; drivers take what follows a question mark, and end with errors of theirs.

    Raises:
        UserError: the driver cannot do with the address.
    """
    try:
        return engine.connect()
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{address}: {line}") from None


def _is_numbered(table: Any, kind: Kind) -> bool:
    """Return whether a table is the collecting service's: numbered rows that never change."""
    names = {column.name for column in table.columns}
    keys = [column.name for column in table.primary_key.columns]
    service = kind in (Kind.EVENTS, Kind.USERS)
    return service and keys == [_NUMBER] and names == {_NUMBER, *SCHEMAS[kind].names}


def _count(connection: Any, table: Any) -> list[int | None]:
    from sqlalchemy import func, select

    number = table.c[_NUMBER]
    query = select(func.count(), func.min(number), func.max(number)).select_from(table)
    return list(connection.execute(query).one())


def _stream(
    connection: Any, table: Any, columns: list[str], last: int | None = None
) -> Iterator[Sequence[Any]]:
    """Yield chunks of rows in the table's order, up to the number ``last`` where it is given."""
    from sqlalchemy import select, text

    wanted = [table.c[name] for name in columns]
    # Not every type has an order: by the columns that are read alone.
    order = list(table.primary_key.columns) or wanted
    dialect = connection.dialect.name
    query = select(*(_choose(column, dialect) for column in wanted)).order_by(*order)
    if last is not None:
        query = query.where(table.c[_NUMBER] <= last)
    if dialect == _POSTGRES:
        connection.execute(text("SET LOCAL datestyle TO ISO"))  # of the times that become text
    options = {"stream_results": True, "yield_per": _ROWS_PER_CHUNK}
    yield from connection.execution_options(**options).execute(query).partitions()


def _choose(column: Any, dialect: str) -> Any:
    """Return a column as it is selected: with all that it holds."""
    from sqlalchemy import cast, type_coerce, types

    if dialect == _POSTGRES and isinstance(column.type, types.Date | types.DateTime):
        return cast(column, types.Text)  # infinity and years before Christ are no times of Python
    if dialect == _SQLITE:
        return type_coerce(column, types.NullType())  # as it is stored
    if isinstance(column.type, types.Float):
        # MySQL's doubles would be decimals of ten places.
        return type_coerce(column, types.Float(asdecimal=False))
    return column


def _is_untyped(connection: Any) -> bool:
    """Return whether a column's type says nothing sure of its values: SQLite takes any in any."""
    return bool(connection.dialect.name == _SQLITE)


def _arrow_type(kind: Any, untyped: bool) -> pa.DataType:
    from sqlalchemy import types

    if isinstance(kind, types.Integer):
        return pa.int64()
    if isinstance(kind, types.Float):
        return pa.float64()
    if isinstance(kind, types.Numeric):
        return _DECIMAL
    if isinstance(kind, types.DateTime) and not untyped:
        return pa.timestamp("us", tz="UTC" if kind.timezone else None)
    if isinstance(kind, types.Boolean):
        return pa.bool_()
    return pa.string()


def _to_arrow(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return values as a column of a type; as text where that is it, or does not suit them all."""
    try:
        if pa.types.is_floating(kind):
            return pa.array([None if v is None else float(v) for v in values], kind)
        if pa.types.is_boolean(kind):
            return pa.array([None if v is None else _BOOLEANS[v] for v in values], kind)
        if pa.types.is_timestamp(kind):
            return pa.array(values).cast(kind)
        if not pa.types.is_string(kind) and kind != _DECIMAL:
            return pa.array(values, kind)
    except (pa.ArrowException, ArithmeticError, KeyError, TypeError, ValueError):
        pass
    return pa.array([None if v is None else to_text(v) for v in values], pa.string())
