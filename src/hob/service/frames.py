"""Frames out of a byte stream, for both ends of the socket between the two processes. What is in them: messages.py."""

from __future__ import annotations

from hob.errors import InternalError
from hob.messages import FRAME_HEADER, MAX_FRAME_BYTES


class FrameSplitter:
    """Bytes as a socket gives them -> the bodies of whole frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes | bytearray]:
        """Bodies that are whole now. Raises InternalError for a frame that is announced longer than allowed."""
        if not self._rest and len(data) > FRAME_HEADER.size and len(data) == _end_of(data):
            return [data[FRAME_HEADER.size :]]  # one report, all of it: the usual case
        self._rest += data
        bodies: list[bytes | bytearray] = []
        while len(self._rest) >= FRAME_HEADER.size and len(self._rest) >= (end := _end_of(self._rest)):
            bodies.append(self._rest[FRAME_HEADER.size : end])
            del self._rest[:end]
        return bodies


def _end_of(data: bytes | bytearray) -> int:
    (length,) = FRAME_HEADER.unpack_from(data)
    if length > MAX_FRAME_BYTES:
        raise InternalError(f"a frame of {length} bytes is announced, at most {MAX_FRAME_BYTES} are allowed")
    return FRAME_HEADER.size + int(length)
