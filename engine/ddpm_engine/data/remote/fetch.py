"""Reading over HTTP: retried with growing pauses, and complete or an error."""

from __future__ import annotations

import http.client
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

ATTEMPTS = 6
TIMEOUT_SECONDS = 30.0
"""Of connecting, and of every read."""

_FIRST_PAUSE_SECONDS = 0.5
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class FetchError(OSError):
    """Something could not be fetched; the message names the URL and says why."""

    def __init__(self, url: str, reason: str, lasting: bool = False) -> None:
        super().__init__(f"cannot fetch {url}: {reason}")
        self.strerror = str(self)
        self.lasting = lasting
        """Whether trying again is of no use."""


class Body:
    """The body of a response, which must be as long as its header says.

    Raises:
        FetchError: the server cannot be reached or refuses, or later, the connection breaks.
    """

    def __init__(self, url: str) -> None:
        if not is_http(url):
            # urllib would open files, too.
            raise FetchError(url, "only http:// and https:// are fetched", lasting=True)
        self.url = url
        try:
            self._response = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            raise FetchError(url, reason, error.code not in _TRANSIENT) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(url, str(error)) from error
        length = self._response.headers.get("Content-Length", "")
        self.length = int(length) if length.isdecimal() else None
        """Bytes that the server announced, if it did."""
        self._seen = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        try:
            piece: bytes = self._response.read(size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(self.url, str(error)) from error
        self._seen += len(piece)
        if len(piece) < size and self.length is not None and self._seen < self.length:
            raise FetchError(self.url, f"it ended after {self._seen} of {self.length} bytes")
        return piece

    def close(self) -> None:
        """Close the connection."""
        self._response.close()

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_http(location: str) -> bool:
    """Whether a location is an http(s) URL."""
    return urllib.parse.urlsplit(location).scheme.lower() in ("http", "https")


def retried(work: Callable[[], Result]) -> Result:
    """Call `work`, again while it raises a `FetchError` that may pass, `ATTEMPTS` times in all.

    Pauses double, and differ between processes, so that a server that comes back is not stormed.

    Raises:
        FetchError: the last one.
    """
    pause = _FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except FetchError as error:
            if error.lasting or attempt == ATTEMPTS:
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def fetch(url: str, at_most: int) -> bytes:
    """The whole of a small file.

    Raises:
        FetchError: it cannot be had, or is longer than `at_most` bytes.
    """

    def attempt() -> bytes:
        with Body(url) as body:
            content = bytearray()
            while piece := body.read(1 << 20):
                content += piece
                if len(content) > at_most:
                    raise FetchError(url, f"it has more than {at_most} bytes", lasting=True)
        return bytes(content)

    return retried(attempt)
