"""Fetch one address into a spool file: going on where the last try stopped, as long as it is the same file.

    first try   GET                                     -> 200, all of it
    later       GET, Range: bytes=N-, If-Range: tag     -> 206, the rest, or 200 if the file has changed: start anew

What the file was (address, tag, length) is kept in `<spool>.json`. A server that gives no tag must at least give the
same total length. Only https is followed, redirects too (http to this machine). Knows no models.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hob.errors import ModelNotFound, ServiceError
from hob.models.sources import LOOPBACK_HOSTS, check_url
from hob.models.spool import Progress, Spool, check_room, storage_errors

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

MAX_FRUITLESS_TRIES = 4
"""Tries in a row that bring no byte."""
FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0
TIMEOUT_S = 30.0
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@dataclass
class _Remote:
    """What the server said of the file."""

    url: str
    tag: str = ""
    """Strong ETag, else Last-Modified."""
    total: int = 0
    """Bytes. 0: not told."""


def state_path(spool: Path) -> Path:
    """Where it is kept what the spool file is a part of."""
    return spool.with_name(spool.name + ".json")


def download(url: str, spool_path: Path, on_progress: Progress) -> None:
    """Fetch all of it. The connection may break: it is taken up again while bytes come.

    Raises ModelNotFound (404), ServiceError (unreachable, refused, broken off too often: the spool file stays),
    StorageError (disk full: it does not), InvalidRequest (an address that is not https).
    """
    check_url(url)
    with Spool(spool_path) as spool:
        remote = _recall(url, spool)
        fruitless = 0
        while True:
            before = spool.size
            fault = _try(remote, spool, on_progress)
            if fault is None:
                break
            fruitless = 0 if spool.size > before else fruitless + 1
            log.info("%s: %s after %d bytes", url, fault, spool.size)
            if fruitless == MAX_FRUITLESS_TRIES:
                of_total = f" of {remote.total:,}" if remote.total else ""
                raise ServiceError(
                    f"{url}: {fault}. {spool.size:,}{of_total} bytes are here. "
                    "Run the same `hob pull` again: it goes on from there."
                )
            time.sleep(min(FIRST_PAUSE_S * 2**fruitless, MAX_PAUSE_S))
        spool.sync()


def _try(remote: _Remote, spool: Spool, on_progress: Progress) -> str | None:
    """One request. None: the file is all there; else why it is not yet."""
    import httpx

    if remote.total and spool.size == remote.total:
        return None
    headers = {"Accept-Encoding": "identity"}
    if spool.size:
        headers["Range"] = f"bytes={spool.size}-"
        if remote.tag:
            headers["If-Range"] = remote.tag
    try:
        with _client(remote.url) as client, client.stream("GET", remote.url, headers=headers) as reply:
            if (fault := _begin(reply, remote, spool)) is not None:
                return fault
            check_room(spool.path.parent, remote.total - spool.size, remote.url)
            for chunk in reply.iter_raw():
                spool.write(chunk, remote.total)
                on_progress(spool.size, remote.total, "download")
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    except httpx.TooManyRedirects as error:
        raise ServiceError(f"{remote.url}: {error}. Expected a direct address of a file.") from error
    if remote.total and spool.size != remote.total:
        had, remote.total = spool.size, 0
        spool.restart()
        return f"the server sent {had:,} bytes and said it would be another number"
    return None


def _begin(reply: httpx.Response, remote: _Remote, spool: Spool) -> str | None:
    """Take in the head of a reply: where its bytes belong. Not None: why they cannot be used."""
    status = reply.status_code
    if status in (404, 410):
        raise ModelNotFound(f"{remote.url}: status {status}, there is no such file. Check the address.", param="model")
    if status == 206:
        found = _RANGE.fullmatch(reply.headers.get("content-range", ""))
        start, total = (int(found[1]), int(found[2])) if found else (-1, -1)
        if start == spool.size and total == (remote.total or total):
            _remember(remote, spool, _tag(reply) or remote.tag, total)
            return None
    if status in (206, 416):  # what is here is no beginning of what the server has
        spool.restart()
        remote.tag, remote.total = "", 0
        return "the file has changed on the server: starting anew"
    if status == 429 or status >= 500:
        return f"status {status}"
    if status != 200:
        raise ServiceError(f"{remote.url}: status {status}. Expected 200: does it want a login?")
    spool.restart()
    length = reply.headers.get("content-length", "")
    _remember(remote, spool, _tag(reply), int(length) if length.isdigit() else 0)
    return None


def _client(url: str) -> httpx.Client:
    """A client that follows redirects to allowed addresses only. Proxies of the environment are not for loopback."""
    import httpx

    def check(request: httpx.Request) -> None:
        check_url(str(request.url))

    is_local = httpx.URL(url).host in LOOPBACK_HOSTS
    return httpx.Client(
        follow_redirects=True, timeout=TIMEOUT_S, trust_env=not is_local, event_hooks={"request": [check]}
    )


def _tag(reply: httpx.Response) -> str:
    """What tells this version of the file from others. A weak tag does not promise equal bytes."""
    tag: str = reply.headers.get("etag", "")
    return tag if tag and not tag.startswith("W/") else str(reply.headers.get("last-modified", ""))


def _remember(remote: _Remote, spool: Spool, tag: str, total: int) -> None:
    remote.tag, remote.total = tag, total
    with storage_errors(spool.path, total):
        state_path(spool.path).write_text(json.dumps(asdict(remote)))


def _recall(url: str, spool: Spool) -> _Remote:
    """What the spool file is a part of; it is emptied if that is not known or something else."""
    try:
        remote = _Remote(**json.loads(state_path(spool.path).read_text()))
        is_usable = remote.url == url and (not remote.total or spool.size <= remote.total)
    except (OSError, ValueError, TypeError):
        is_usable = False
    if is_usable:
        return remote
    spool.restart()
    return _Remote(url)
