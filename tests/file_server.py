"""A web server on loopback for one file, that misbehaves on demand: cuts, ignores ranges, changes the file, fails."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Behaviour:
    """What the server does. Changed by tests between and during requests."""

    data: bytes
    etag: str | None = '"v1"'
    cut_after: list[int] = field(default_factory=list)
    """For the next requests, one each: bytes after which the connection is dropped."""
    statuses: list[int] = field(default_factory=list)
    """For the next requests, one each: answer with this status and nothing else."""
    takes_ranges: bool = True
    tells_length: bool = True
    redirect: str | None = None
    pause_s: float = 0.0
    """Before each 64 kB."""
    ranges: list[str | None] = field(default_factory=list)
    """Range header of each request so far."""


class _Handler(http.server.BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        """What huggingface_hub asks before it fetches a file."""
        if self.behaviour.statuses:
            self.send_response(self.behaviour.statuses.pop(0))
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{"e" * 40}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(self.behaviour.data)))
        self.end_headers()

    def do_GET(self) -> None:
        it = self.behaviour
        it.ranges.append(self.headers.get("Range"))
        if it.redirect is not None:
            self.send_response(302)
            self.send_header("Location", it.redirect)
            self.end_headers()
        elif it.statuses:
            self.send_error(it.statuses.pop(0))
        else:
            self._send(it)

    def _send(self, it: Behaviour) -> None:
        start, asked = 0, self.headers.get("Range")
        is_same = self.headers.get("If-Range") in (None, it.etag)
        if asked and it.takes_ranges and is_same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(it.data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(it.data) - 1}/{len(it.data)}")
        else:
            self.send_response(200)
        if it.etag:
            self.send_header("ETag", it.etag)
        if it.tells_length:
            self.send_header("Content-Length", str(len(it.data) - start))
        self.end_headers()
        body = it.data[start:]
        if it.cut_after:
            body = body[: it.cut_after.pop(0)]
        for i in range(0, len(body), 1 << 16):
            time.sleep(it.pause_s)
            try:
                self.wfile.write(body[i : i + (1 << 16)])
            except OSError:  # the client left
                return


@contextmanager
def serve_file(data: bytes) -> Iterator[tuple[str, Behaviour]]:
    """The file's address and the server's behaviour."""
    behaviour = Behaviour(data)
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/files/Tiny%20Model.gguf", behaviour
        finally:
            server.shutdown()
            thread.join()
