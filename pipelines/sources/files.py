"""Events from files: CSV, JSON Lines and Parquet, by path, folder, glob or fsspec URL.

Readers stream: a block of a CSV or JSON Lines file, a slice of a Parquet row group, one at a
time, in the order of the file; files come in the order of their names. A damaged file stops
the run by name; a damaged line is a row of the quarantine.

CSV files have a header; the separator is the one of comma, semicolon, tab and bar that the
header holds most of. A value in quotation marks may hold line breaks; lines that a mark has
swallowed by mistake are told by their separators, and each is a row of the quarantine. Text is
UTF-8 unless ``ingest.files.encoding`` says what it is. JSON Lines hold one object a line; a key
may be missing from a line, which is a null, but a mapped key must occur in some line of the source.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import FileFormat, Files
from pipelines.errors import UserError
from pipelines.sources.base import (
    NESTED,
    ROW,
    SCHEMAS,
    Batch,
    Kind,
    Mapping,
    Refused,
    SeenKeys,
    add_refused,
    find_mapping,
)
from pipelines.sources.text import decode_bytes

_ENDINGS: Final[dict[str, FileFormat]] = {
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".parquet": FileFormat.PARQUET,
    ".pq": FileFormat.PARQUET,
}
# What is to be done to files of other kinds.
_OTHER_ENDINGS: Final = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV"),
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz"), "unpack it"),
}
_COMPRESSIONS: Final[dict[str, str]] = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

_BLOCK_BYTES: Final = 16 << 20
_ROWS_PER_CHUNK: Final = 1 << 17
_SHOWN_NAMES: Final = 3

# A file of JSON Lines with fewer may lack a key by chance.
_TELLING_ROWS: Final = 1000

# A longer value is a quotation mark that nobody closed: it has swallowed the lines after it.
_MAX_VALUE_BYTES: Final = 1 << 16

_UTF8: Final = "utf-8"
NOT_UTF8: Final = "not UTF-8"
NOT_UTF8_ADVICE: Final = (
    "say in ingest.files.encoding what it is (cp1252, utf-16, utf-16-le, ...), or save the file as"
    " UTF-8"
)

_DELIMITERS: Final = ",;\t|"

# Cannot occur in JSON text, where control characters are escaped.
_NO_DELIMITER: Final = "\x01"

# A mark at the start of a value, closed lines later by another one, swallows the lines between.
# Of its lines this share must look like rows: text of several lines rarely has as many separators
# in each as the header has.
_SWALLOWED_SHARE: Final = 0.9
OPEN_QUOTE: Final = "a quotation mark seems not to be closed"
OPEN_QUOTE_ADVICE: Final = (
    "close it, double the marks inside of quoted values, or set ingest.files.quoted: false where"
    " the file quotes none"
)

# Stands for bytes that are no text while they are read: a Unicode noncharacter, which text for
# interchange never holds.
_DAMAGE_MARK: Final = "\ufdd0"
_MARK_DAMAGE: Final = "forecart.mark"
codecs.register_error(_MARK_DAMAGE, lambda error: (_DAMAGE_MARK, error.end))  # type: ignore[attr-defined]
_SURROGATES: Final = re.compile("[\udc80-\udcff]+")

# What object stores and servers call a content hash or, failing that, a version.
_VERSION_KEYS: Final = (
    "etag",
    "md5hash",
    "content_md5",
    "md5",
    "checksum",
    "crc32c",
    "versionid",
    "generation",
    "lastmodified",
    "last_modified",
    "mtime",
)


@dataclass(frozen=True, kw_only=True)
class _File:
    """One file: its path in the file system, and its name in messages and fingerprints."""

    path: str
    name: str
    format: FileFormat
    compression: str | None


class _EmptyFileError(UserError):
    """A file without a header: fine beside others."""


class _Refused(NamedTuple):
    """A line that gives no row."""

    row: int
    reason: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some rows of a file: ``row`` and source columns; and lines refused."""

    table: pa.Table
    refused: list[_Refused] = field(default_factory=list)


class FilesSource:
    """Events, and perhaps users and items, from files."""

    def __init__(self, params: Files, root: Path = Path()) -> None:
        """Remember where to look; nothing is opened yet.

        Args:
            params: the ``ingest.files`` section.
            root: folder that relative paths start from.
        """
        self._params = params
        self._root = root
        self._skipped: dict[Kind, list[str]] = {}
        self._lacking: dict[Kind, list[str]] = {}
        self._unused: dict[Kind, list[str]] = {}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Source``: names with content hashes (local) or versions (remote)."""
        tables: dict[str, Any] = {}
        for kind in Kind:
            if self._path(kind) is not None:
                fs, files = self._find(kind)
                tables[kind.value] = [
                    {"name": file.name, **self._describe(fs, file)} for file in files
                ]
        return {"source": "files", **tables}

    def read(self, kind: Kind) -> Iterator[Batch]:
        """See ``Source``."""
        if self._path(kind) is None:
            return
        from pipelines.sources.mapping import Mapper, connect

        mapping, key = find_mapping(self._params, kind)
        fs, files = self._find(kind)
        keys = SeenKeys(kind, mapping, files[0].name, "line")
        # With columns, a missing one shows in each file.
        if any(file.format is not FileFormat.JSONL for file in files):
            keys.missing = set()
        optional = _SeenColumns(kind, mapping)
        self._lacking[kind] = optional.lacking
        connection = connect()
        empty = 0
        for file in files:
            with _tell_damage(file, self._params):
                try:
                    reader = _open_reader(fs, file, connection, keys, self._params)
                except _EmptyFileError:
                    empty += 1
                    if empty == len(files):
                        raise
                    continue
                mapper = Mapper(
                    kind,
                    mapping,
                    file.name,
                    reader.columns,
                    connection,
                    f"ingest.files.{key}",
                    decimal=self._params.decimal if file.format is FileFormat.CSV else ".",
                )
                rows, given = 0, set[str]()
                for chunk in reader.read(mapper.columns):
                    rows += chunk.table.num_rows
                    given |= _find_given(chunk.table)
                    refused = [Refused(r.row, r.reason, _show_line(r.text)) for r in chunk.refused]
                    yield add_refused(mapper.convert(chunk.table), refused)
                if file.format is FileFormat.JSONL:
                    optional.note(file, given, complete=rows >= _TELLING_ROWS)
                    continue
                optional.note(file, set(reader.columns.names))
                # Of events much is left out. Users and items are given for what they hold.
                if kind is not Kind.EVENTS and file is files[0] and not mapper.complete:
                    unused = [c for c in reader.columns.names if c not in mapper.columns]
                    self._unused[kind] = [f"{', '.join(unused)} of {file.name}"] if unused else []
        keys.check()

    def fingerprint_read(self) -> dict[str, Any]:
        """See ``Source``: what is there once all is read."""
        return self.fingerprint()

    def tell_omissions(self) -> str:
        """See ``Source``: files left out for their endings, and columns that some lack."""
        return (
            _tell_some("not read for their endings", self._skipped)
            + _tell_some("columns that are not everywhere, null there", self._lacking)
            + _tell_some("columns that are not used", self._unused)
        )

    def _describe(self, fs: Any, file: _File) -> dict[str, Any]:
        with _tell_damage(file, self._params):
            return _describe_content(fs, file)

    def _path(self, kind: Kind) -> str | None:
        return {
            Kind.EVENTS: self._params.path,
            Kind.USERS: self._params.users,
            Kind.ITEMS: self._params.items,
        }[kind]

    def _find(self, kind: Kind) -> tuple[Any, list[_File]]:
        path = self._path(kind) or ""
        given, key = None, f"ingest.files.{kind}"
        if kind is Kind.EVENTS:
            given, key = self._params.format, "ingest.files.path"
        fs, files, self._skipped[kind] = _find_files(path, given, key, self._root)
        return fs, files


# -- finding ---------------------------------------------------------------------------------


def _find_files(
    path: str, given: FileFormat | None, key: str, root: Path
) -> tuple[Any, list[_File], list[str]]:
    """Return the file system, the files behind a path and the names skipped, in their order.

    In a folder a file counts by its ending; with a format given, also where it tells none.

    Raises:
        UserError: naming the setting and the path, where there is nothing to read.
    """
    import fsspec

    skipped: list[str] = []
    try:
        if "://" in path:
            fs, place = fsspec.core.url_to_fs(path)
        else:
            fs = fsspec.filesystem("file")
            place = fs._strip_protocol(str(root / path))
        if fs.isdir(place):
            base, there = place, [p for p in _walk(fs, place) if not _is_hidden(p, place)]
            wanted = {given, None} if given else set(FileFormat)
            found = [p for p in there if _split_name(p)[0] in wanted]
            if not found and given is None:
                found = there  # the first is told below
            skipped = sorted(_relative(p, place) for p in set(there) - set(found))
            if not found:
                raise UserError(f"{key}: {path}: no {given or 'event'} files in this folder")
        elif fs.isfile(place):
            base, found = str(PurePosixPath(place).parent), [place]
        elif any(c in place for c in "*?["):
            base, found = _fixed_part(place), [p for p in fs.glob(place) if not fs.isdir(p)]
            if not found:
                raise UserError(f"{key}: {path}: no file matches")
        else:
            raise UserError(f"{key}: {path}: no such file or folder")
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}: {path}: {_first_line(error)}") from None
    except PermissionError as error:
        raise UserError(f"{key}: {error.filename or path}: no permission to read it") from None
    files = []
    for name in sorted(found):
        ending, compression = _split_name(name)
        file_format = given or ending
        if file_format is None:
            advice = f"set ingest.files.format to {', '.join(FileFormat)}"
            advice = _OTHER_ENDINGS.get(PurePosixPath(name).suffix.lower(), advice)
            raise UserError(f"{key}: {name}: the ending tells no format; {advice}")
        relative = _relative(name, fs._strip_protocol(base))
        files.append(_File(path=name, name=relative, format=file_format, compression=compression))
    return fs, files, skipped


def _walk(fs: Any, folder: str) -> list[str]:
    """Return all files below a folder; behind links, too, but each real folder once."""
    if not _is_local(fs):
        return list(fs.find(folder))

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [f"{place}/{name}" for name in names]
        # Real folders first, so that a link among them does not take their place.
        below = sorted(folders, key=lambda name: (Path(place, name).is_symlink(), name))
        folders.clear()
        for name in below:
            real = os.path.realpath(f"{place}/{name}")
            if real not in seen:
                seen.add(real)
                folders.append(name)
    return found


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _split_name(path: str) -> tuple[FileFormat | None, str | None]:
    """Return the format and compression that a file's ending tells."""
    suffixes = ["", *(suffix.lower() for suffix in PurePosixPath(path).suffixes)]
    compression = _COMPRESSIONS.get(suffixes[-1])
    return _ENDINGS.get(suffixes[-1 if compression is None else -2]), compression


def _is_hidden(path: str, base: str) -> bool:
    # Spark and others leave _SUCCESS, .crc files and the like beside the data.
    return any(part.startswith((".", "_")) for part in PurePosixPath(_relative(path, base)).parts)


def _relative(path: str, base: str) -> str:
    return path.removeprefix(base.rstrip("/")).lstrip("/")


def _fixed_part(pattern: str) -> str:
    """Return the folder above the first part of a glob that holds a wildcard."""
    parts = PurePosixPath(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    return str(PurePosixPath(*parts[:fixed])) if fixed else ""


def _describe_content(fs: Any, file: _File) -> dict[str, Any]:
    if _is_local(fs):
        with fs.open(file.path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
        return {"bytes": fs.size(file.path), "digest": f"sha256:{digest.hexdigest()}"}
    info = {str(k).lower().replace("-", ""): v for k, v in fs.info(file.path).items()}
    versions = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
    return {
        "bytes": info.get("size"),
        "version": versions or str(fs.checksum(file.path)),
    }


# -- reading ---------------------------------------------------------------------------------


def _tell_some(what: str, of_kinds: dict[Kind, list[str]]) -> str:
    """Name the first of what there is, and count the rest."""
    names = [name for names in of_kinds.values() for name in names]
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return f"; {what}: {', '.join(names[:_SHOWN_NAMES])}{more}"


class _SeenColumns:
    """Notes the columns that some files have and others lack.

    Searches have no price, and are right to lack it; a column that was renamed would be null.

    Attributes:
        lacking: what is to be told.
    """

    def __init__(self, kind: Kind, mapping: Mapping) -> None:
        self.lacking: list[str] = []
        self._names = [name for name in SCHEMAS[kind].names if name not in mapping]
        self._names += sorted({m.column for m in mapping.values() if m is not None and m.column})
        self._first: dict[tuple[str, bool], str] = {}  # of the files that have a column, or lack it

    def note(self, file: _File, columns: set[str], *, complete: bool = True) -> None:
        """Note the columns of a file.

        Args:
            file: for messages.
            columns: those that it has.
            complete: whether it lacks all others; a few lines of JSON lack some by chance.
        """
        for name in self._names:
            has, first = name in columns, self._first
            if (name, has) not in first and (has or complete):
                first[name, has] = file.name
                if (name, not has) in first:
                    told = f"{name} in {first[name, False]} (as in {first[name, True]})"
                    self.lacking.append(told)


def _find_given(table: pa.Table) -> set[str]:
    """Return the columns that hold anything."""
    pairs = zip(table.column_names, table.columns, strict=True)
    return {name for name, column in pairs if column.null_count < table.num_rows}


class _ParquetReader:
    """Yields slices of row groups."""

    def __init__(self, fs: Any, file: _File) -> None:
        import pyarrow.parquet as pq

        self._parquet = pq.ParquetFile(_open(fs, file))
        self.columns = pa.schema([c.with_type(_plain(c.type)) for c in self._parquet.schema_arrow])

    def read(self, columns: list[str]) -> Iterator[_Chunk]:
        first = 1
        for batch in self._parquet.iter_batches(_ROWS_PER_CHUNK, columns=columns):
            numbers = np.arange(first, first + batch.num_rows)
            table = pa.table([_make_plain(column) for column in batch], batch.schema.names)
            yield _Chunk(table=_number_rows(table, numbers))
            first += batch.num_rows
        self._parquet.close(force=True)


class _CsvReader:
    """Yields blocks of lines."""

    def __init__(self, fs: Any, file: _File, params: Files) -> None:
        self._fs = fs
        self._file = file
        self._quoted = params.quoted
        self._encoding = params.encoding
        with _open(fs, file) as stream:
            header, self._ended = _read_first_line(file, _Utf8Stream(stream, params.encoding))
        self._delimiter = max(_DELIMITERS, key=header.count)
        plain = csv.reader([header], delimiter=self._delimiter, quoting=csv.QUOTE_NONE)
        quoted = csv.reader([header], delimiter=self._delimiter)
        names = next(quoted if self._quoted else plain, [])
        names = [name.strip() for name in names]
        if not any(names):
            raise UserError(f"{file.name}: the first line is empty; it should name the columns")
        self.columns = pa.schema([pa.field(name, pa.string()) for name in names])

    def read(self, columns: list[str]) -> Iterator[_Chunk]:
        if not self._ended:
            return  # the header alone, which the parser takes for a row cut off
        mapped = [f"c{self.columns.names.index(name)}" for name in columns]
        names = [f"c{index}" for index in range(len(self.columns))]
        quote = '"' if self._quoted else False
        with _open(self._fs, self._file) as stream:
            for chunk in _read_blocks(
                self._file,
                _Utf8Stream(stream, self._encoding),
                names,
                delimiter=self._delimiter,
                quote=quote,
                header=1,
                mapped=mapped,
            ):
                table = chunk.table.select([ROW, *mapped])
                yield replace(chunk, table=table.rename_columns([ROW, *columns]))


class _JsonReader:
    """Yields blocks of JSON lines, of which it takes the wanted keys as text."""

    def __init__(
        self, fs: Any, file: _File, connection: Any, keys: SeenKeys, params: Files
    ) -> None:
        self._encoding = params.encoding
        self._fs = fs
        self._file = file
        self._connection = connection
        self._keys = keys
        self.columns = pa.schema([pa.field(name, pa.string()) for name in keys.wanted])

    def read(self, columns: list[str]) -> Iterator[_Chunk]:
        with _open(self._fs, self._file) as stream:
            if not stream.read(1):
                return  # an hour without events
        with _open(self._fs, self._file) as stream:
            for chunk in _read_blocks(
                self._file,
                _Utf8Stream(stream, self._encoding),
                ["line"],
                delimiter=_NO_DELIMITER,
                quote=False,
                header=0,
            ):
                yield self._extract(chunk, columns)

    def _extract(self, chunk: _Chunk, columns: list[str]) -> _Chunk:
        # The inner CASE keeps text that is no JSON away from json_type, which fails on it.
        valid = self._query(
            chunk.table,
            "SELECT coalesce(CASE WHEN json_valid(line) THEN json_type(line) END = 'OBJECT',"
            " FALSE) AS valid FROM lines",
        ).column("valid")
        lines, refused = chunk.table, chunk.refused
        if not pc.all(valid, min_count=0).as_py():
            bad = lines.filter(pc.invert(valid)).to_pydict()
            rows = zip(bad[ROW], bad["line"], strict=True)
            refused = refused + [_Refused(row, "not a JSON object", text) for row, text in rows]
            lines = lines.filter(valid)
        if self._keys.missing:
            keys = self._query(lines, "SELECT DISTINCT unnest(json_keys(line)) AS key FROM lines")
            self._keys.see(keys.column("key").to_pylist())
        pointers = ", ".join(_pointer(name) for name in columns)
        items = ", ".join(f"found[{i}] AS c{i}" for i in range(1, len(columns) + 1))
        found = f"(SELECT {ROW}, json_extract_string(line, [{pointers}]) AS found FROM lines)"  # noqa: S608
        table = self._query(lines, f"SELECT {ROW}, {items} FROM {found}")  # noqa: S608
        table = table.rename_columns([ROW, *columns])
        for name in columns:
            table, lines, nested = self._split_nested(table, lines, name)
            refused = refused + nested
        return _Chunk(table=table, refused=refused)

    def _split_nested(
        self, table: pa.Table, lines: pa.Table, name: str
    ) -> tuple[pa.Table, pa.Table, list[_Refused]]:
        """Take out rows that hold a list or an object where one value belongs."""
        alike = pc.match_substring_regex(table.column(name), r"^[\[{]")
        rows = table.column(ROW).filter(pc.fill_null(alike, False))
        if not len(rows):
            return table, lines, []
        # Text may begin like one, too.
        found = self._query(
            lines.filter(pc.is_in(lines.column(ROW), rows)),
            f"SELECT * FROM lines WHERE json_type(line, {_pointer(name)}) IN ('ARRAY', 'OBJECT')",  # noqa: S608
        )
        pairs = zip(*(found.column(c).to_pylist() for c in (ROW, "line")), strict=True)
        refused = [_Refused(row, f"{name} {NESTED}", line) for row, line in pairs]
        kept = [
            t.filter(pc.invert(pc.is_in(t.column(ROW), found.column(ROW)))) for t in (table, lines)
        ]
        return kept[0], kept[1], refused

    def _query(self, lines: pa.Table, query: str) -> pa.Table:
        self._connection.register("lines", lines)
        result = self._connection.sql(query).to_arrow_table()
        self._connection.unregister("lines")
        return result


def _pointer(key: str) -> str:
    """Return the JSON pointer (RFC 6901) of a key as an SQL literal."""
    return "'/" + key.replace("~", "~0").replace("/", "~1").replace("'", "''") + "'"


def _open_reader(
    fs: Any, file: _File, connection: Any, keys: SeenKeys, params: Files
) -> _ParquetReader | _CsvReader | _JsonReader:
    if file.format is FileFormat.PARQUET:
        return _ParquetReader(fs, file)
    if file.format is FileFormat.CSV:
        return _CsvReader(fs, file, params)
    return _JsonReader(fs, file, connection, keys, params)


def _open(fs: Any, file: _File) -> pa.NativeFile:
    """Open a file for reading, decompressed; closing it closes what is below."""
    raw = pa.PythonFile(fs.open(file.path, "rb"), mode="r")
    return raw if file.compression is None else pa.CompressedInputStream(raw, file.compression)


def _read_first_line(file: _File, text: _Utf8Stream) -> tuple[str, bool]:
    """Return the first line, and whether anything ends it: else it is the only one."""
    start = text.read(_MAX_VALUE_BYTES)
    if not start:
        raise _EmptyFileError(f"{file.name}: the file is empty")
    while len(start) < _MAX_VALUE_BYTES and len(start.splitlines()) == 1:
        more = text.read(_MAX_VALUE_BYTES)
        if not more:
            break
        start += more
    ended = len(start.splitlines()) > 1 or start.endswith((b"\n", b"\r"))
    line = start.splitlines()[0].decode("utf-8-sig", errors="replace")
    if _DAMAGE_MARK in line or "\0" in line:
        raise UserError(f"{file.name}: the first line is {text.damage}; {NOT_UTF8_ADVICE}")
    return line, ended


def _read_blocks(
    file: _File,
    text: _Utf8Stream,
    names: list[str],
    *,
    delimiter: str,
    quote: str | bool,
    header: int,
    mapped: Sequence[str] = (),
) -> Iterator[_Chunk]:
    """Split text into columns, block by block.

    Args:
        file: for messages.
        text: at its start.
        names: columns that every line must have.
        delimiter: one character.
        quote: the quotation mark; False for none.
        header: lines to skip at the start.
        mapped: columns that are used; a quotation mark left open shows in the length of these.
    """
    from pyarrow import csv as arrow_csv

    refused: list[_Refused] = []

    def refuse(row: Any) -> str:
        reason = "fewer values than columns"
        if row.actual_columns > row.expected_columns:
            reason = "more values than columns"
        refused.append(_Refused(row.number - header, reason, row.text))
        return "skip"

    reader = arrow_csv.open_csv(
        pa.PythonFile(text, mode="r"),
        # Threads would leave the rows without numbers.
        read_options=arrow_csv.ReadOptions(
            use_threads=False,
            block_size=_BLOCK_BYTES,
            column_names=names,
            skip_rows_after_names=header,
        ),
        parse_options=arrow_csv.ParseOptions(
            delimiter=delimiter,
            quote_char=quote,
            double_quote=bool(quote),
            newlines_in_values=bool(quote),
            ignore_empty_lines=False,
            invalid_row_handler=refuse,
        ),
        convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    following = 1
    end = _Refused(0, "", "")
    for batch in reader:
        # The parser is ahead of the conversion: all refused rows before the last of this block
        # are known here, and perhaps some of later blocks.
        gaps = np.array([r.row for r in refused], dtype=np.int64)
        numbers = _number(following, batch.num_rows, gaps)
        table = pa.Table.from_batches([batch])
        if quote:
            _check_lengths(file, table.select(list(mapped)), numbers)
        if batch.num_rows:
            following = int(numbers[-1]) + 1
            (values,) = table.slice(batch.num_rows - 1).to_pylist()
            end = _Refused(following - 1, "", "".join(values.values()))
        filled = _find_filled(table)
        table = _number_rows(table.filter(filled), numbers[filled])
        done = [r for r in refused if r.row < following]
        refused[:] = [r for r in refused if r.row >= following]
        if quote and text.quotes:
            done = _tell_swallowed(done, len(names), delimiter)
            table, swallowed = _split_swallowed(table, delimiter)
            done += swallowed
        if text.damaged:
            table, damaged = _split_damaged(table, text.damage)
            done += damaged
        yield _Chunk(table=table, refused=done)
    end = refused[-1] if refused else end
    if quote and text.quotes % 2 and "\n" in end.text:
        raise UserError(f"{file.name}, row {end.row}: {OPEN_QUOTE}; {OPEN_QUOTE_ADVICE}")
    if refused:
        nothing = pa.schema([(name, pa.string()) for name in names]).empty_table()
        if quote and text.quotes:
            refused = _tell_swallowed(refused, len(names), delimiter)
        yield _Chunk(table=_number_rows(nothing, np.arange(0)), refused=refused)


class _Utf8Stream:
    """A byte stream made UTF-8, in which a mark stands for bytes that are no text.

    The CSV parser would fail on the whole file, or lose the text of a line it refuses.

    Args:
        stream: decompressed bytes.
        encoding: of the text.
    """

    def __init__(self, stream: pa.NativeFile, encoding: str) -> None:
        self._stream = stream
        # A function for each damage is slow: where it can be done without, it is.
        self._marks = encoding != _UTF8
        handler = _MARK_DAMAGE if self._marks else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(encoding)(handler)
        self.damage = NOT_UTF8 if encoding == _UTF8 else f"not {encoding}"
        self._held = b""
        self.damaged = False
        self.quotes = 0  # quotation marks read

    @property
    def closed(self) -> bool:
        return bool(self._stream.closed)

    def close(self) -> None:
        self._stream.close()

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at the end alone."""
        while not self._held:
            raw = self._stream.read(size)
            text = self._decoder.decode(raw, final=not raw)
            self.damaged |= self._marks and _DAMAGE_MARK in text
            try:
                self._held = text.encode()
            except UnicodeEncodeError:  # a lone surrogate stands for a byte that is not UTF-8
                self.damaged = True
                self._held = _SURROGATES.sub(_DAMAGE_MARK, text).encode()
            self.quotes += self._held.count(b'"')
            if not raw:
                break
        part, self._held = self._held[:size], self._held[size:]
        return part


def _split_damaged(table: pa.Table, damage: str) -> tuple[pa.Table, list[_Refused]]:
    """Take out rows with a mark of bytes that are no text."""
    damaged = np.zeros(table.num_rows, dtype=bool)
    for name in table.column_names:
        if name != ROW:
            damaged |= pc.match_substring(table.column(name), _DAMAGE_MARK).to_numpy()
    refused = []
    for row in table.filter(damaged).to_pylist():
        number = row.pop(ROW)
        refused.append(_Refused(number, damage, "|".join(row.values())))
    return table.filter(~damaged), refused


def _tell_swallowed(refused: list[_Refused], columns: int, delimiter: str) -> list[_Refused]:
    """Return refused rows with those that hold whole lines as these lines, so that each counts."""
    told = []
    for row in refused:
        lines = row.text.splitlines()
        whole = sum(line.count(delimiter) == columns - 1 for line in lines)
        if len(lines) > 1 and 2 * whole >= len(lines):
            told += [_Refused(row.row, OPEN_QUOTE, line) for line in lines]
        else:
            told.append(row)
    return told


def _split_swallowed(table: pa.Table, delimiter: str) -> tuple[pa.Table, list[_Refused]]:
    """Take out rows with a value that has swallowed lines: each of these is refused."""
    names = [name for name in table.column_names if name != ROW]
    others = len(names) - 1
    swallowed = np.zeros(table.num_rows, dtype=bool)
    for place, name in enumerate(names):
        column = table.column(name)
        if not others or not _holds_line_break(column):
            continue
        # Each line that was swallowed brings the separators of a row.
        breaks = pc.count_substring(column, "\n").to_numpy()
        expected = breaks * others
        excess = np.abs(pc.count_substring(column, delimiter).to_numpy() - expected)
        for index in np.flatnonzero((breaks > 0) & (excess <= (1 - _SWALLOWED_SHARE) * expected)):
            found = [line.count(delimiter) for line in column[index].as_py().split("\n")]
            # The rest of its row, whole rows, and what comes before the mark that closes it.
            rows = [others - place, *[others] * (len(found) - 2), place]
            alike = sum(a == b for a, b in zip(found, rows, strict=True))
            swallowed[index] |= alike >= _SWALLOWED_SHARE * len(rows)
    if not swallowed.any():
        return table, []
    refused = []
    for values in table.filter(swallowed).to_pylist():
        row = values.pop(ROW)
        lines = delimiter.join(values.values()).splitlines()
        refused += [_Refused(row, OPEN_QUOTE, line) for line in lines]
    return table.filter(~swallowed), refused


def _holds_line_break(column: pa.ChunkedArray) -> bool:
    """Return whether the column's text may hold a line break: a look at its bytes, not its rows."""
    for chunk in column.chunks:
        data = chunk.buffers()[2]
        if data is not None and (np.frombuffer(data, np.uint8) == ord("\n")).any():
            return True
    return False


def _number(first: int, count: int, gaps: np.ndarray) -> np.ndarray:
    """Return the ``count`` lowest numbers from ``first`` on that are not in ``gaps`` (sorted)."""
    gaps = gaps[gaps >= first]
    plain = first + np.arange(count, dtype=np.int64)
    return plain + np.searchsorted(gaps - np.arange(len(gaps)), plain, side="right")


def _check_lengths(file: _File, table: pa.Table, numbers: np.ndarray) -> None:
    for column in table.columns:
        lengths = pc.binary_length(column)
        if (pc.max(lengths).as_py() or 0) > _MAX_VALUE_BYTES:
            row = numbers[pc.index(pc.greater(lengths, _MAX_VALUE_BYTES), True).as_py()]
            raise UserError(
                f"{file.name}, row {row}: a value of over {_MAX_VALUE_BYTES} bytes; {OPEN_QUOTE};"
                f" {OPEN_QUOTE_ADVICE}"
            )


def _find_filled(table: pa.Table) -> np.ndarray:
    """Return which rows hold anything: an empty line is not a row."""
    filled = np.zeros(table.num_rows, dtype=bool)
    for column in table.columns:
        filled |= pc.greater(pc.binary_length(column), 0).to_numpy()
    return filled


def _number_rows(table: pa.Table, numbers: np.ndarray) -> pa.Table:
    return table.add_column(0, ROW, pa.array(numbers, pa.int64()))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type as which a column of Parquet is read.

    Bytes are text, which old writers leave unmarked, or ids; DuckDB knows no halves of a float.
    """
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if _is_bytes(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _make_plain(column: pa.Array) -> pa.Array:
    """Return a column as its plain type."""
    if not _is_bytes(column.type):
        return column.cast(_plain(column.type))
    # Each value once: ids and categories repeat.
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = [None if v is None else decode_bytes(v) for v in coded.dictionary.to_pylist()]
    return pa.array(values, pa.string()).take(coded.indices)


def _show_line(text: str) -> str:
    return json.dumps({"line": text.replace(_DAMAGE_MARK, "\ufffd")}, ensure_ascii=False)


@contextmanager
def _tell_damage(file: _File, params: Files) -> Iterator[None]:
    """Tell by the file's name why it cannot be read.

    Raises:
        UserError: it has gone, may not be read, or is damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file.name}: the file has gone, or is a link to nowhere") from None
    except PermissionError:
        raise UserError(f"{file.name}: no permission to read it") from None
    except UnicodeError as error:  # UTF-16 that does not say its order of bytes
        raise UserError(
            f"{file.name}: not {params.encoding} ({_first_line(error)}); {NOT_UTF8_ADVICE}"
        ) from None
    except (pa.ArrowException, OSError) as error:
        # With a number it is the machine's (a full disk, a lost connection).
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file.name}: {_explain_damage(file, params, error)}") from None


def _explain_damage(file: _File, params: Files, error: Exception) -> str:
    if "straddling" in str(error):
        told = f"a row of over {_BLOCK_BYTES >> 20} MiB"
        quoted = file.format is FileFormat.CSV and params.quoted
        return f"{told}; {OPEN_QUOTE}; {OPEN_QUOTE_ADVICE}" if quoted else told
    what = file.format if file.compression is None else f"{file.compression} {file.format}"
    return f"not a readable {what} file, damaged or cut off ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
