"""Read files under a URL: retried with growing pauses, and complete or an error.

http(s) is read by the standard library, every other scheme (s3://, gs://, hf://, ...) by fsspec and
the back end that it names. fsspec's own http(s) back end would need aiohttp, which nothing else
here needs, and its timeouts bound a whole download instead of each read.
"""

from __future__ import annotations

import http.client
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from ddpm_engine.errors import UserError
from ddpm_engine.locations import HIDDEN, is_http, is_url, redacted, user_of
from ddpm_engine.waiting import announced

Result = TypeVar("Result")

ATTEMPTS = 6
TIMEOUT_SECONDS = 30.0
"""Limit on connecting, and on every read, over http(s). Other back ends have their own."""

PATIENCE_SECONDS = 90.0
"""Time after which nothing is tried again."""

_FIRST_PAUSE_SECONDS = 0.5
_REMEMBERED_SECONDS = 60.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


_given_up: dict[str, tuple[float, str]] = {}
"""Servers that did not answer: until when they are not asked again, and why."""

logger = logging.getLogger(__name__)


class FetchError(OSError):
    """Something could not be fetched; the message names the URL and says why."""

    def __init__(
        self, url: str, reason: str, lasting: bool = False, unreachable: bool = False
    ) -> None:
        password = (user_of(url) or "").partition(":")[2]
        if password:  # some libraries quote it
            reason = reason.replace(password, HIDDEN)
        self.reason = reason
        super().__init__(redacted(f"cannot fetch {url}: {reason}"))
        self.strerror = str(self)
        self.lasting = lasting
        """Whether trying again is of no use."""
        self.unreachable = unreachable
        """Whether there was no answer at all."""
        self.host = _host_of(url)


class Body:
    """The content of a remote file, which must be as long as its server announced.

    Raises:
        FetchError: the server cannot be reached or refuses, or later, the connection breaks.
        UserError: the package that reads this scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        check_scheme(url)
        given_up = _given_up.get(_host_of(url))
        if given_up is not None and time.monotonic() < given_up[0]:
            raise FetchError(url, given_up[1], lasting=True)
        with announced(f"waiting for {redacted(url)}"):
            self._stream, self.length = _open_http(url) if is_http(url) else _open_fsspec(url)
        self._seen = 0

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end."""
        try:
            piece: bytes = self._stream.read(size)
        except Exception as error:  # each back end has errors of its own
            raise FetchError(self.url, str(error)) from error
        self._seen += len(piece)
        if len(piece) < size and self.length is not None and self._seen < self.length:
            raise FetchError(self.url, f"it ended after {self._seen} of {self.length} bytes")
        return piece

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_scheme(url: str) -> None:
    """Check that URLs of this scheme can be read here.

    Raises:
        UserError: the scheme is unknown, or needs a package that is not installed; or an http(s)
            URL names a user.
    """
    shown = redacted(url)
    if url == shown and user_of(url) is not None:
        raise UserError(
            f"{shown} was recorded without its user and password, as all URLs are; give the whole "
            "URL again"
        )
    if is_http(url):
        if user_of(url) is not None:
            raise UserError(
                f"{shown} names a user or a password, with which http(s) is not read here; leave "
                "them out, or mount the server's folder and give its path"
            )
        return
    if not is_url(url):
        raise UserError(f"{shown} is not a URL")
    # fsspec chains schemes by "::", as in simplecache::s3://bucket/file.
    for scheme in url.partition("://")[0].lower().split("::"):
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            # The message names the package, as in "Install s3fs to access S3".
            raise UserError(f"{shown} cannot be read here: {error}") from error
        except ValueError as error:
            raise UserError(
                f"{shown} has an unknown scheme, {scheme}: give an http(s):// URL, or one that "
                "fsspec knows, such as s3://, gs:// or hf://"
            ) from error


def retried(work: Callable[[], Result]) -> Result:
    """Call `work` until it succeeds, at most `ATTEMPTS` times and for `PATIENCE_SECONDS`.

    It is called again after a `FetchError` that may pass. Pauses double, and differ between
    processes, so that a server that comes back is not stormed. A server that did not answer in all
    that time is not asked again for a while: thousands of files must not all wait for it.

    Raises:
        FetchError: the last one.
    """
    pause = _FIRST_PAUSE_SECONDS
    deadline = time.monotonic() + PATIENCE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except FetchError as error:
            late = time.monotonic() > deadline
            if not error.lasting and (late or (attempt == ATTEMPTS and error.unreachable)):
                _given_up[error.host] = time.monotonic() + _REMEMBERED_SECONDS, error.reason
            if error.lasting or late or attempt == ATTEMPTS:
                raise
            if attempt == 1:
                seconds = deadline - time.monotonic()
                logger.warning("%s; trying again for up to %.0f s", error, seconds)
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def fetch(url: str, at_most: int) -> bytes:
    """Return the whole content of a small file.

    Raises:
        FetchError: it cannot be had, or is longer than `at_most` bytes.
        UserError: the package that reads this scheme is not installed.
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


def _host_of(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _open_http(url: str) -> tuple[Any, int | None]:
    """Return the response's stream and the length that its header announces, if it does."""
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"{error.code} {error.reason}"
        raise FetchError(url, reason, error.code not in _TRANSIENT) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise FetchError(url, str(error), lasting=True) from error
    except (OSError, http.client.HTTPException) as error:
        if "no host given" in str(error):
            raise FetchError(url, "it names no host", lasting=True) from error
        raise FetchError(url, str(error), unreachable=True) from error
    length = response.headers.get("Content-Length", "")
    return response, int(length) if length.isdecimal() else None


def _open_fsspec(url: str) -> tuple[Any, int | None]:
    """Return the file's stream and its length, if the back end knows it."""
    try:
        system, path = fsspec.core.url_to_fs(url)
        # Listings of before are not trusted: the file may have come, or changed, since.
        system.invalidate_cache()
        size = system.size(path)
        return system.open(path, "rb"), size
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FetchError(url, reason, lasting=True) from error
    except Exception as error:  # each back end has errors of its own
        raise FetchError(url, f"{type(error).__name__}: {error}") from error
