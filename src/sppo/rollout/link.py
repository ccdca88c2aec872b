"""HTTP to one server, by the standard library: a request, and the JSON lines of its answer as they come."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import secrets
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import RecipeError, WorkerLost
from ..files import first_line
from .wire import LARGEST_REQUEST, URL_VARIABLE, proof

CONNECT_SECONDS = 10.0
LONGEST_LINE, PART = 1 << 28, 1 << 16
"""Bytes of a line of an answer, at most; bytes that are read at once."""

MEND = "see whether sppo rollout serve still runs there, start it again if not, and go on with --resume"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is."""

    url: str
    host: str
    port: int | None
    secure: bool
    path: str


def place(url: str) -> Place:
    """The server of a URL. Raises RecipeError for anything but http://HOST:PORT or https://HOST, perhaps with a path."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    plain = host and url.isascii() and url.isprintable() and " " not in url
    if not plain or parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        said = f"url={url} is not" if url else f"url (or {URL_VARIABLE}) is missing:"
        raise RecipeError(f"rollout.engine: served's {said} http://HOST:PORT or https://HOST")
    assert host is not None
    return Place(url.rstrip("/"), host, port, parts.scheme == "https", parts.path.rstrip("/"))


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Link:
    """`timeout` are the seconds that may pass until the next bytes can be sent or come."""

    def __init__(self, where: Place, token: str, timeout: float) -> None:
        self.where, self.url, self.timeout = where, where.url, timeout
        self._token = token
        self._kept: http.client.HTTPConnection | None = None
        self._keep = False

    def lost(self, why: str, mend: str = MEND) -> WorkerLost:
        """The error for a server that cannot be used any more."""
        self.close()
        return WorkerLost(f"rollout worker {self.url} is lost: {why}; {mend}")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Requests within go over one connection."""
        self._keep = True
        try:
            yield
        finally:
            self._keep = False
            self.close()

    def close(self) -> None:
        """Close what is open."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def ask(
        self,
        method: str,
        path: str,
        tree: dict[str, Any] | None = None,
        *,
        parts: Iterable[memoryview] | None = None,
        size: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Send JSON, or `size` bytes in parts; yields the objects of the answer.

        Raises Refused for an answer that is not 200, WorkerLost where there is none.
        """
        body = b"" if tree is None else json.dumps(tree).encode()
        if len(body) > LARGEST_REQUEST:
            raise Refused(413, f"a request of {len(body)} bytes is above {LARGEST_REQUEST}")
        headers = {"Authorization": f"Bearer {self._token}", "Content-Length": str(size if parts else len(body))}
        try:
            connection = self._connection()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer says why
                connection.request(method, self.where.path + path, parts or body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Refused(response.status, _reason(response.read(PART)))
            yield from _objects(response)
            response.close()  # read to its end, so that the connection can take the next request
        except TimeoutError:
            raise self.lost(f"it gave no sign of life for {self.timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise self.lost(_why(error)) from None
        except (ValueError, RecursionError) as error:
            raise self.lost(f"its answer cannot be read ({first_line(error)})") from None
        except BaseException:
            self.close()  # what is still to come belongs to this request
            raise
        if not self._keep:
            self.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._kept is None:
            where = self.where
            if where.secure:
                made: http.client.HTTPConnection = http.client.HTTPSConnection(
                    where.host, where.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
                )
            else:
                made = http.client.HTTPConnection(where.host, where.port, timeout=CONNECT_SECONDS)
            try:
                made.connect()
            except TimeoutError:
                raise OSError(f"no connection within {CONNECT_SECONDS:g} seconds") from None
            made.sock.settimeout(self.timeout)
            made.auto_open = 0  # another connection may lead to somebody else
            self._kept = made
            self._meet(made)
        return self._kept

    def _meet(self, connection: http.client.HTTPConnection) -> None:
        """See that who answers has the token, before it is told to them. Raises Refused (401) where they do not, or
        whatever `ask` takes for a server that is lost."""
        nonce = secrets.token_hex(16)
        connection.request("GET", f"{self.where.path}/hello?nonce={nonce}")
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}; it is no worker of sppo rollout serve")
        (found,) = _objects(response)
        response.close()
        shown = str(found.get("proof", ""))
        if not hmac.compare_digest(shown.encode(), proof(self._token, nonce).encode()):
            raise Refused(401, "it does not have this token")


def _objects(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The lines of JSON of an answer. Raises ValueError for anything else."""
    rest = bytearray()
    while part := response.read1(PART):
        *lines, last = part.split(b"\n")
        for line in lines:
            found = json.loads(bytes(rest) + line)
            rest.clear()
            if not isinstance(found, dict):
                raise ValueError("a line is no object")
            yield found
        rest += last
        if len(rest) > LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE} bytes")
    if rest:
        raise ValueError("a line broke off")


def _why(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody answers there"
    if isinstance(error, http.client.NotConnected | http.client.IncompleteRead | ConnectionError):
        return "the connection broke"
    return getattr(error, "strerror", None) or first_line(error)


def _reason(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"])[:1000]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:200].decode("utf-8", "replace")
