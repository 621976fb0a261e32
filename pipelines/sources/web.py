"""Asks a web server for JSON: with patience, within bounds, and without giving a login away."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urljoin, urlsplit

from pipelines.address import hide_login
from pipelines.errors import UserError

# A header of every request, such as "Authorization: Bearer ..."; several in a line each.
HEADER_VARIABLE: Final = "FORECART_REST_HEADER"

_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*([ -~]*[!-~])[ \t]*")
_MAX_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 1 << 16
_TRIES: Final = 5
_LONGEST_PAUSE: Final = 60.0
_CONNECT_SECONDS: Final = 10.0
_PATIENCE: Final = 60.0
_MOST_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_PASSING: Final = frozenset({408, 425, 429})
_PORTS: Final = {"http": 80, "https": 443}
# A shorter word of a header may stand in any text.
_SECRET_LENGTH: Final = 8


class StatusError(UserError):
    """The server refuses, with a status of 400 to 499."""

    def __init__(self, message: str, status: int) -> None:
        """Keep the status."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        url: that answered, after redirects.
        data: the JSON, its numbers as the text that they were sent as; None where there is none.
        link: the address in the header ``Link`` with ``rel="next"``.
    """

    url: str
    data: Any
    link: str | None


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """An answer before its body is looked at."""

    body: bytes
    status: int
    kind: str
    link: str | None
    location: str | None


class _PassingError(Exception):
    """What may be over in a while; ``pause`` is how long the server asks to wait, in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class Client:
    """Asks one host for JSON.

    Args:
        pause: before the second try, in seconds; it doubles with each.
        patience: how long the server may be silent, in seconds; five times that is what a whole
            answer may take.

    Raises:
        UserError: the variable with the header holds none.
    """

    def __init__(self, *, pause: float = 1.0, patience: float = _PATIENCE) -> None:
        """Read the header; nothing is asked yet."""
        import requests

        self._pause = pause
        self._patience = patience
        self._headers = _read_headers()
        self._session = requests.Session()
        # Redirects are this class's: the library would read their bodies whole, however large.
        self._session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
        self._session.headers["Accept"] = "application/json"
        self._session.headers["User-Agent"] = "forecart"
        self._session.headers.update(self._headers)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def show(self, url: str) -> str:
        """Return an address for people, in one line and without what is secret."""
        text = "".join(c if c.isprintable() else "?" for c in hide_login(url))
        for value in self._headers.values():
            for word in value.split():
                if len(word) >= _SECRET_LENGTH:
                    # As it is, and as it stands in an address.
                    text = text.replace(word, "***").replace(quote(word, safe=""), "***")
        return text

    def fetch(self, url: str) -> Answer:
        """Get an answer; redirects are followed on the same host.

        Args:
            url: address, http or https.

        Raises:
            StatusError: the server refuses.
            UserError: nothing answers after some tries, the answer is too large or no JSON, or
                leads to another host.
        """
        for _ in range(_MOST_REDIRECTS + 1):
            reply = self._ask(url)
            if reply.location is None:
                return Answer(url=url, data=self._parse(url, reply), link=reply.link)
            url = self.follow(url, reply.location, "a redirect")
        raise UserError(f"{self.show(url)}: redirected more than {_MOST_REDIRECTS} times")

    def follow(self, url: str, target: str, what: str) -> str:
        """Return an address that another one leads to.

        Args:
            url: where it stands.
            target: what stands there, perhaps relative.
            what: for messages.

        Raises:
            UserError: it is on another host, or a step from https to http.
        """
        try:
            joined = urljoin(url, target)
            scheme = urlsplit(joined).scheme
            if scheme not in _PORTS:
                told = f"{what} leads to {self.show(scheme)}, which is neither http nor https"
                raise UserError(f"{self.show(url)}: {told}")
            after, before = _locate(joined), _locate(url)
        except ValueError:
            told = f"{what} leads to what is no address: {self.show(target)}"
            raise UserError(f"{self.show(url)}: {told}") from None
        if after[1] == before[1] and (before[0], after[0]) == ("https", "http"):
            raise UserError(f"{self.show(url)}: {what} leads from https to http, and is not asked")
        upgraded = before[0] == "http" and after[0] == "https" and after[2] == _PORTS["https"]
        if after[1] != before[1] or (after[2] != before[2] and not upgraded):
            place = f"{after[1]}:{after[2]}" if after[1] == before[1] else after[1]
            told = f"{what} leads to another host, {self.show(place)}, which is not asked"
            raise UserError(f"{self.show(url)}: {told}")
        return joined

    def _ask(self, url: str) -> _Reply:
        for number in range(_TRIES):
            try:
                return self._try(url)
            except _PassingError as error:
                if number == _TRIES - 1:
                    told = f"{error}, after {_TRIES} tries"
                    raise UserError(f"{self.show(url)}: {told}") from None
                time.sleep(min(max(error.pause, self._pause * 2**number), _LONGEST_PAUSE))
        raise AssertionError

    def _try(self, url: str) -> _Reply:
        deadline = time.monotonic() + 5 * self._patience
        with (
            self._tell_failures(url),
            self._session.get(
                url,
                stream=True,
                allow_redirects=False,
                timeout=(min(_CONNECT_SECONDS, self._patience), self._patience),
                auth=lambda request: request,  # none of ~/.netrc
            ) as response,
        ):
            status, headers = response.status_code, response.headers
            if status in _PASSING or status >= 500:
                told = f"answers {_name_status(status)}"
                raise _PassingError(told, _read_pause(headers.get("Retry-After", "")))
            location = headers.get("Location") if status in _REDIRECTS else None
            if location is None and status not in (HTTPStatus.OK, HTTPStatus.NO_CONTENT):
                told = f"{self.show(url)}: answers {_name_status(status)}{self._advise(status)}"
                raise StatusError(told, status) if 400 <= status < 500 else UserError(told)
            body = self._read(url, response.raw, deadline) if location is None else b""
            return _Reply(
                body=body,
                status=status,
                kind=headers.get("Content-Type", "").split(";")[0],
                link=response.links.get("next", {}).get("url"),
                location=location,
            )

    def _read(self, url: str, raw: Any, deadline: float) -> bytes:
        """Read a body, unpacked: what is packed small may be large."""
        parts, size = [], 0
        while part := raw.read1(_BLOCK_BYTES, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > _MAX_BYTES:
                told = f"a page of over {_MAX_BYTES >> 20} MiB; ask for fewer records a page"
                raise UserError(f"{self.show(url)}: {told}")
            if time.monotonic() > deadline:
                raise _PassingError(f"no whole answer within {5 * self._patience:g} s")
        return b"".join(parts)

    def _parse(self, url: str, reply: _Reply) -> Any:
        if reply.status == HTTPStatus.NO_CONTENT:
            return None
        try:
            # Numbers stay text: a double would keep the first fifteen digits of an id.
            return json.loads(reply.body, parse_int=str, parse_float=str, parse_constant=str)
        except RecursionError:
            raise UserError(f"{self.show(url)}: the answer is nested too deep") from None
        except ValueError:  # also what is not UTF-8
            kind = self.show(reply.kind) or "of no type"
            raise UserError(f"{self.show(url)}: the answer is no JSON ({kind})") from None

    def _advise(self, status: int) -> str:
        if status not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return ""
        return f"; {HEADER_VARIABLE} is {'not accepted' if self._headers else 'not set'}"

    @contextmanager
    def _tell_failures(self, url: str) -> Iterator[None]:
        """Tell what may pass from what will not; libraries' own words hold addresses with keys."""
        import requests
        from urllib3.exceptions import DecodeError, HTTPError, TimeoutError

        try:
            yield
        except (requests.Timeout, TimeoutError):
            raise _PassingError(f"no answer within {self._patience:g} s") from None
        except DecodeError:
            raise UserError(f"{self.show(url)}: the answer cannot be unpacked") from None
        except requests.exceptions.SSLError as error:
            raise UserError(f"{self.show(url)}: {_tell_cause(error)}") from None
        except (requests.ConnectionError, HTTPError) as error:
            raise _PassingError(_tell_cause(error)) from None
        except (OSError, ValueError) as error:  # a file of certificates, an address
            told = f"cannot be asked ({type(error).__name__})"
            raise UserError(f"{self.show(url)}: {told}") from None


def _read_headers() -> dict[str, str]:
    """Return the headers that hold a login.

    Raises:
        UserError: the variable holds something else, which is not shown.
    """
    headers = {}
    for line in os.environ.get(HEADER_VARIABLE, "").splitlines():
        if not line.strip():
            continue
        found = _HEADER.fullmatch(line.strip())
        if found is None:
            raise UserError(f'{HEADER_VARIABLE}: expected "Name: value", as in "X-Key: abc"')
        headers[found[1]] = found[2]
    return headers


def _locate(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port, as those who connect read them.

    Raises:
        ValueError: it is no address.
    """
    from urllib3.util import parse_url

    # Other parsers take another host for one with a backslash in it. Its errors are ValueErrors.
    parts = parse_url(url)
    scheme, host = parts.scheme or "", parts.host or ""
    if not host:
        raise ValueError
    return scheme, host, parts.port or _PORTS.get(scheme, 0)


def _read_pause(text: str) -> float:
    """Return how long a header ``Retry-After`` asks to wait, in seconds; 0 where it does not."""
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (OverflowError, ValueError):
        return 0.0
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _name_status(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _tell_cause(error: BaseException) -> str:
    """Return what the system said of a failed connection, where it did."""
    told = "the connection broke off, or what came is no HTTP"
    while True:
        if isinstance(error, OSError) and error.strerror:
            told = error.strerror
        under = error.__cause__ or error.__context__ or getattr(error, "reason", None)
        if not isinstance(under, BaseException):
            return told.splitlines()[0]
        error = under
