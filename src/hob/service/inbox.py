"""The engine process's end of the socket: a thread that reads, so that a step can be stopped for an urgent request.

    socket --thread--> messages, in order --receive--> loop
                 \\--> an interactive Submit while a step runs: the step is asked to stop, if that pays

The thread sleeps in the kernel while nothing comes, and a step runs without the GIL: it costs nothing between messages.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable

from hob.messages import FromEngine, Submit, ToEngine, decode_to_engine, encode_frame
from hob.request import ServiceClass
from hob.scheduler.abandon import StepUnderWay
from hob.service.frames import FrameSplitter
from hob.service.watchdog import Watchdog


class Inbox:
    """Messages as they come. `receive` and `watch` are the loop's; `stop_step` is called by the reading thread."""

    def __init__(
        self,
        connection: socket.socket,
        stop_step: Callable[[], None],
        clock: Callable[[], float],
        watchdog: Watchdog | None = None,
    ) -> None:
        self._watchdog = watchdog
        self._connection = connection
        self._stop_step = stop_step
        self._clock = clock
        self._messages: deque[ToEngine | Exception] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._step: StepUnderWay | None = None
        self.is_alarmed = False
        """Whether one of `urgent` had something during the last `receive`. To ask it again would find nothing: the
        kernel tells of a pressure event once."""
        threading.Thread(target=self._read, name="hob-inbox", daemon=True).start()

    def receive(
        self, timeout_s: float | None, others: Iterable[int] = (), urgent: Iterable[int] = ()
    ) -> list[ToEngine]:
        """All messages that have come; waits for one as long as told, None: for ever, or until another file can be
        read, or one of `urgent` has something out of band (a pressure trigger).

        Raises EOFError when the other end has closed.
        """
        self.is_alarmed = False
        if timeout_s != 0 and not self._messages:
            self.is_alarmed = _wait([self._wake, *others], urgent, timeout_s)
        messages: list[ToEngine] = []
        if self._messages:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Exception):
                raise message
            messages.append(message)
        return messages

    def watch(self, step: StepUnderWay | None) -> None:
        """A step begins, or None: it has ended."""
        if self._watchdog is not None:
            self._watchdog.watch(step is not None)
        self._step = step

    def send(self, message: FromEngine) -> None:
        """Send one message whole."""
        self._connection.sendall(encode_frame(message))

    def _read(self) -> None:
        splitter = FrameSplitter()
        try:
            while data := self._connection.recv(1 << 20):
                for message in map(decode_to_engine, splitter.feed(data)):
                    self._messages.append(message)
                    if isinstance(message, Submit) and message.request.service_class is ServiceClass.INTERACTIVE:
                        self._interrupt()
                os.eventfd_write(self._wake, 1)
            self._messages.append(EOFError("the API process closed the connection"))
        except Exception as error:  # what cannot be read ends the process, in the loop's thread
            self._messages.append(error)
        os.eventfd_write(self._wake, 1)

    def _interrupt(self) -> None:
        step = self._step
        if step is not None and step.should_stop(self._clock()):
            self._stop_step()


def _wait(files: Iterable[int], urgent: Iterable[int], timeout_s: float | None) -> bool:
    """Until one can be read, or one of `urgent` has something out of band, which is the answer.

    By poll: each app's blocks are a file for each model, so numbers may pass the 1,023 that select can count to.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    for file in urgent:
        poll.register(file, select.POLLPRI)
    ready = poll.poll(None if timeout_s is None else 1000 * timeout_s)
    return any(events & select.POLLPRI for _, events in ready)
