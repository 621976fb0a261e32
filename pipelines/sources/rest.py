"""Events from a REST API that answers in JSON, page by page.

Every run asks for all pages twice: once for the fingerprint, a hash over the values that are used
of each record in the order read, and once to read them, when they must be the same. What else an
answer holds, such as the time of it, is not looked at.

Values are text, as in JSON Lines: ids and prices keep all of their digits. A dotted name reaches
into objects, and a number in it into a list; a key that has dots itself is found as well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import pyarrow as pa

from pipelines.config import UNTIL, Endpoint, Pages, Paging, Rest
from pipelines.errors import UserError
from pipelines.sources.base import (
    NESTED,
    ROW,
    Batch,
    Kind,
    Refused,
    SeenKeys,
    add_refused,
    choose_origins,
    find_mapping,
    needed_columns,
)
from pipelines.sources.content import Content
from pipelines.sources.web import Answer, Client, StatusError

EACH_ADVICE: Final = (
    "a dotted name such as customer.id reaches into an object, and ingest.rest.each makes a row of"
    " each entry of a list"
)

_SECTION: Final = "ingest.rest"
_ROWS_PER_CHUNK: Final = 1 << 15
_SHOWN_DEPTH: Final = 3
_MISSING: Final = object()
# What ends the pages where the next cursor or address would stand.
_ENDS: Final = (_MISSING, None, False, "", "0")
_SHOWN_NAMES: Final = 40
# JSON can write the first or second half of a character alone; no text can hold it.
_HALF: Final = re.compile("[\ud800-\udfff]")


@dataclass(kw_only=True)
class _Chunk:
    """Some rows.

    Attributes:
        found: (rows, columns) what was found for each row, refused ones included.
        numbers: of the rows that are not refused.
        values: (numbers, columns) their values.
        refused: rows that hold something else than values.
    """

    found: list[Sequence[Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    values: list[list[Any]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class RestSource:
    """Events, and perhaps users and items, from the endpoints of a REST API."""

    def __init__(
        self,
        params: Rest,
        until: datetime | None = None,
        *,
        pause: float = 1.0,
        patience: float = 60.0,
    ) -> None:
        """Remember where to look; nothing is asked yet.

        Args:
            params: the ``ingest.rest`` section.
            until: what ``{until}`` in a query stands for.
            pause: before a second try, in seconds.
            patience: how long the server may be silent, in seconds.
        """
        self._params = params
        self._until = until
        self._pause = pause
        self._patience = patience
        self._read: dict[str, Any] = {}
        self._omissions: dict[str, None] = {}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Source``: a hash of the records of each endpoint."""
        tables: dict[str, Any] = {}
        with closing(self._connect()) as client:
            for kind in Kind:
                reader = self._open(kind, client)
                if reader is not None:
                    content = Content()
                    for chunk in reader.read():
                        content.add(chunk.found)
                    tables[kind.value] = {"url": reader.source, **content.describe()}
        return {"source": "rest", **tables}

    def read(self, kind: Kind) -> Iterator[Batch]:
        """See ``Source``."""
        from pipelines.sources.mapping import Mapper, connect

        with closing(self._connect()) as client:
            reader = self._open(kind, client)
            if reader is None:
                return
            mapping, key = find_mapping(self._params, kind)
            schema = pa.schema([(name, pa.string()) for name in reader.keys.wanted])
            source = reader.source
            mapper = Mapper(kind, mapping, source, schema, connect(), f"{_SECTION}.{key}")
            content = Content()
            for chunk in reader.read():
                content.add(chunk.found)
                table = pa.table(
                    [
                        pa.array(chunk.numbers, pa.int64()),
                        *(
                            pa.array([row[i] for row in chunk.values], pa.string())
                            for i in range(len(mapper.columns))
                        ),
                    ],
                    names=[ROW, *mapper.columns],
                )
                yield add_refused(mapper.convert(table), chunk.refused)
            self._read[kind.value] = {"url": source, **content.describe()}

    def fingerprint_read(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"source": "rest", **self._read}

    def tell_omissions(self) -> str:
        """See ``Source``: next pages that were not found, or not asked for."""
        return "".join(f"; {told}" for told in self._omissions)

    def _connect(self) -> Client:
        return Client(pause=self._pause, patience=self._patience)

    def _open(self, kind: Kind, client: Client) -> _Reader | None:
        """Return what reads a table; None where it has no endpoint."""
        endpoints = {
            Kind.EVENTS: self._params,
            Kind.USERS: self._params.users,
            Kind.ITEMS: self._params.items,
        }
        endpoint = endpoints[kind]
        if endpoint is None or endpoint.url is None:
            return None
        mapping, name = find_mapping(self._params, kind)
        source = client.show(endpoint.url)
        keys = SeenKeys(kind, mapping, source, "record")
        origins = choose_origins(kind, mapping, source, keys.wanted, f"{_SECTION}.{name}")
        pages = endpoint.pages or self._params.pages or Pages()
        return _Reader(
            key=_SECTION if kind is Kind.EVENTS else f"{_SECTION}.{kind}",
            source=source,
            client=client,
            keys=keys,
            columns=needed_columns(origins),
            first=_add_query(endpoint.url, self._fill(endpoint)),
            records=endpoint.records,
            each=self._params.each if kind is Kind.EVENTS else None,
            pages=pages,
            omissions=self._omissions,
        )

    def _fill(self, endpoint: Endpoint) -> dict[str, str]:
        """Return the parameters of a query, the time until which events are read put in."""
        if self._until is None:
            return endpoint.query
        until = self._until.astimezone(UTC).isoformat().replace("+00:00", "Z")
        return {name: value.replace(UNTIL, until) for name, value in endpoint.query.items()}


@dataclass(kw_only=True)
class _Reader:
    """Reads the rows of one endpoint, once.

    Attributes:
        key: the setting that holds the endpoint, for messages.
        source: the endpoint's address, for messages.
        client: asks.
        keys: that are wanted, and those seen.
        columns: dotted names of the values that are read.
        first: address of the first page.
        records: dotted path of the list in an answer.
        each: dotted path of a list in a record.
        pages: how the next page is found.
        omissions: takes what is to be told.
    """

    key: str
    source: str
    client: Client
    keys: SeenKeys
    columns: list[str]
    first: str
    records: str | None
    each: str | None
    pages: Pages
    omissions: dict[str, None]
    _expanded: bool = False

    def read(self) -> Iterator[_Chunk]:
        """Yield the rows in chunks.

        Raises:
            UserError: naming the address and the setting.
        """
        chunk, number, any_record = _Chunk(), 0, False
        for records in self._read_pages():
            for record in records:
                any_record = True
                for row in self._expand(record):
                    number += 1
                    self._add(chunk, number, row)
                    if len(chunk.found) >= _ROWS_PER_CHUNK:
                        yield chunk
                        chunk = _Chunk()
        if any_record and self.each is not None and not self._expanded:
            raise UserError(
                f"{self.source}: no list at {self.each} in any record ({self.key}.each)"
            )
        self.keys.check()
        if chunk.found:
            yield chunk

    # -- rows ------------------------------------------------------------------------------

    def _expand(self, record: Any) -> Iterator[Any]:
        """Yield a row for each entry of the list, which then stands in the list's place."""
        if self.each is None or not isinstance(record, dict):
            yield record
            return
        for row in _expand(record, self.each):
            self._expanded = self._expanded or isinstance(row, dict)
            yield row
        self._expanded = self._expanded or isinstance(find_value(record, self.each), list)

    def _add(self, chunk: _Chunk, number: int, row: Any) -> None:
        if not isinstance(row, dict):
            record = _dump({"record": row}, self.source)
            chunk.found.append((record,))
            chunk.refused.append(Refused(number, "not a JSON object", record))
            return
        if self.keys.missing:
            self.keys.see(n for n in self.keys.missing if find_value(row, n) is not _MISSING)
            if len(self.keys.found) < _SHOWN_NAMES:
                self.keys.see(_list_names(row))
        reason = ""
        values: list[Any] = []
        for name in self.columns:
            value = find_value(row, name)
            if isinstance(value, list | dict):
                reason = reason or f"{name} {NESTED}"
                value = [_dump(value, self.source)]
            elif isinstance(value, bool):
                value = str(value).lower()
            elif isinstance(value, str) and not value.isascii() and _HALF.search(value):
                reason = reason or f"{name} holds half of a character"
            values.append(None if value is _MISSING else value)
        chunk.found.append(values)
        if reason:
            record = _dump(dict(zip(self.columns, values, strict=True)), self.source)
            chunk.refused.append(Refused(number, reason, record))
        else:
            chunk.numbers.append(number)
            chunk.values.append(values)

    # -- pages -----------------------------------------------------------------------------

    def _read_pages(self) -> Iterator[list[Any]]:
        """Yield the records of each page."""
        path = self.records

        def find(answer: Answer) -> list[Any]:
            # What is chosen on the first page holds for all.
            nonlocal path
            if answer.data is None:
                return []
            path = self._choose_path(answer) if path is None else path
            return self._find_list(answer, path)

        if self.pages.by in (Paging.PAGE, Paging.OFFSET):
            yield from self._read_numbered(find)
        else:
            yield from self._read_linked(find)

    def _read_numbered(self, find: Callable[[Answer], list[Any]]) -> Iterator[list[Any]]:
        """Yield pages by their number, or that of their first record, until one is empty."""
        start = self.pages.first if self.pages.first is not None else self.pages.by is Paging.PAGE
        number, last, moved = int(start), b"", False
        while True:
            url = self._ask_for(str(number))
            try:
                records = find(self.client.fetch(url))
            except StatusError as error:
                # How some say that there is no such page.
                if error.status == HTTPStatus.NOT_FOUND and last:
                    return
                raise
            if not records:
                return
            digest = _digest(_dump(records, self.source))
            if digest == last:
                told = f"is {self.pages.parameter} ({self.key}.pages.parameter) right?"
                if moved:
                    # It may be the last one, and may be the most that the server numbers.
                    told = f"{self.key}.pages: {{by: cursor, ...}} finds the end"
                raise UserError(
                    f"{self.client.show(url)}: the page is the one before again; {told}"
                )
            yield records
            last, moved = digest, last != b""
            number += len(records) if self.pages.by is Paging.OFFSET else 1

    def _read_linked(self, find: Callable[[Answer], list[Any]]) -> Iterator[list[Any]]:
        """Yield pages, each of which tells the next one."""
        following: str | None = self.first
        seen: set[bytes] = set()
        while following is not None:
            url = following
            seen.add(_digest(url))
            answer = self.client.fetch(url)
            yield find(answer)
            following = self._find_next(answer)
            if following is not None and _digest(following) in seen:
                raise UserError(
                    f"{self.client.show(url)}: the next page is one that was read already,"
                    f" {self.client.show(following)} ({self.key}.pages)"
                )
        if len(seen) == 1:
            self._tell_only_page(answer)

    def _ask_for(self, value: str) -> str:
        return _add_query(self.first, {self.pages.parameter or "": value})

    def _find_next(self, answer: Answer) -> str | None:
        """Return the address of the next page; None after the last."""
        if self.pages.by is None:
            return None
        if self.pages.by is Paging.LINK:
            found: Any = answer.link
        else:
            found = find_value(answer.data, self.pages.path or "")
        if any(found is end or found == end for end in _ENDS):
            return None
        if not isinstance(found, str):
            raise UserError(
                f"{self.client.show(answer.url)}: what is at {self.pages.path} leads to no page"
                f" ({self.key}.pages.path)"
            )
        if self.pages.by is Paging.CURSOR:
            return self._ask_for(found)
        return self.client.follow(answer.url, found, "the next page")

    def _tell_only_page(self, answer: Answer) -> None:
        """Note that there was one page, where that may be a mistake."""
        by, path = self.pages.by, self.pages.path
        if by is None and answer.link is not None:
            told = f"has a next page, which is not read: {self.key}.pages: {{by: link}} reads it"
        elif by is Paging.LINK:
            told = "answers without a header Link to a next page: one page is read"
        elif path is not None and find_value(answer.data, path) is _MISSING:
            told = f"answers without {path} ({self.key}.pages.path): one page is read"
        else:
            return
        self.omissions[f"{self.source} {told}"] = None

    def _choose_path(self, answer: Answer) -> str:
        """Return where the list is, of an answer that is one or has one at its top; "" for itself.

        Raises:
            UserError: there is none, or more than one.
        """
        data, where = answer.data, self.client.show(answer.url)
        if isinstance(data, list):
            return ""
        parts: dict[str, Any] = data if isinstance(data, dict) else {}
        names = [name for name, part in parts.items() if isinstance(part, list)]
        if len(names) == 1:
            return names[0]
        setting = f"{self.key}.records"
        if names:
            told = f"more than one list in the answer; say in {setting} which it is"
        else:
            told = f"no list in the answer; say in {setting} where it is"
            names = list(parts)
        raise UserError(f"{where}: {told}{_tell_found(map(_show, names))}")

    def _find_list(self, answer: Answer, path: str) -> list[Any]:
        found = find_value(answer.data, path) if path else answer.data
        if found is None and path:
            return []  # how some write a list without entries
        if not isinstance(found, list):
            told = f"no list at {path}" if path else "the answer is no list"
            names = _tell_found(_list_names(answer.data))
            raise UserError(f"{self.client.show(answer.url)}: {told} ({self.key}.records){names}")
        return found


def find_value(value: Any, path: str) -> Any:
    """Return what is at a dotted path; a mark of this module's where nothing is.

    A key that has dots itself comes before one that its first part names.
    """
    if isinstance(value, dict):
        if path in value:
            return value[path]
        end = path.rfind(".")
        while end >= 0:
            head = path[:end]
            if head in value:
                found = find_value(value[head], path[end + 1 :])
                if found is not _MISSING:
                    return found
            end = path.rfind(".", 0, end)
    elif isinstance(value, list):
        head, _, rest = path.partition(".")
        try:
            entry = value[int(head)]
        except (IndexError, ValueError):
            return _MISSING
        return find_value(entry, rest) if rest else entry
    return _MISSING


def _expand(record: dict[str, Any], path: str) -> Iterator[Any]:
    """Yield a record once for each entry of a list, which stands in the list's place.

    Lists on the way to it are gone through likewise.
    """
    end = len(path)
    while end > 0 and path[:end] not in record:
        end = path.rfind(".", 0, end)
    if end <= 0:
        return
    name, rest = path[:end], path[end + 1 :]
    found = record[name]
    if found is None:
        return
    if not rest and not isinstance(found, list):
        # Some write a list of one entry as the entry. A single value is damage.
        yield record if isinstance(found, dict) else found
        return
    for entry in found if isinstance(found, list) else [found]:
        if not rest:
            yield {**record, name: entry}
        elif isinstance(entry, dict):
            for part in _expand(entry, rest):
                yield {**record, name: part} if isinstance(part, dict) else part
        elif entry is not None:
            yield entry  # damage likewise


def _list_names(value: Any, depth: int = _SHOWN_DEPTH) -> list[str]:
    """Return dotted names of some of what an object holds, for people."""
    names: list[str] = []
    if isinstance(value, dict) and depth:
        for name, part in itertools.islice(value.items(), _SHOWN_NAMES):
            shown = _show(name)
            names += [shown, *(f"{shown}.{under}" for under in _list_names(part, depth - 1))]
    return names[:_SHOWN_NAMES]


def _show(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:_SHOWN_NAMES])


def _tell_found(names: Iterable[str]) -> str:
    told = ", ".join(itertools.islice(names, _SHOWN_NAMES))
    return f"; found {told}" if told else ""


def _dump(value: Any, where: str) -> str:
    """Return a value as canonical JSON that can be written.

    Raises:
        UserError: it is nested too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    except RecursionError:
        raise UserError(f"{where}: a record is nested too deep") from None
    return text.encode("utf-8", "replace").decode()


def _add_query(url: str, parameters: dict[str, str]) -> str:
    """Return an address with parameters, in the place of those of the same names."""
    if not parameters:
        return url
    parts = urlsplit(url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in pairs if name not in parameters]
    return parts._replace(query=urlencode([*kept, *parameters.items()])).geturl()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
