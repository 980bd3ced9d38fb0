"""The engine process's end of the socket: order, the end, and the step that is stopped for an urgent request."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from hob.engine.fake import FakeClock
from hob.messages import Cancel, Submit, ToEngine, encode_frame
from hob.request import Request, ServiceClass
from hob.scheduler.abandon import StepUnderWay
from hob.service.inbox import Inbox


class Line:
    """A socket pair with an inbox at one end."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.clock = FakeClock()
        self.stopped = threading.Event()
        self.inbox = Inbox(theirs, self.stopped.set, self.clock)
        self.theirs = theirs

    def send(self, *messages: ToEngine) -> None:
        self.ours.sendall(b"".join(map(encode_frame, messages)))

    def receive(self, count: int) -> list[ToEngine]:
        messages: list[ToEngine] = []
        while len(messages) < count:
            messages += self.inbox.receive(5.0)
        return messages

    def expect_end(self) -> None:
        """All that is left, then EOFError."""
        try:
            while True:
                self.inbox.receive(5.0)
        except EOFError:
            return


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.ours.close()
    made.expect_end()
    made.theirs.close()


def submit(name: str, service_class: ServiceClass) -> Submit:
    return Submit(Request(name, "app", [1, 2, 3], service_class=service_class))


def test_messages_keep_their_order_and_nothing_is_awaited_unless_asked(line: Line) -> None:
    assert line.inbox.receive(0) == []
    line.send(*(Cancel(str(i)) for i in range(200)))
    assert line.receive(200) == [Cancel(str(i)) for i in range(200)]


def test_an_interactive_request_stops_a_long_step(line: Line) -> None:
    line.inbox.watch(StepUnderWay(0.0, 0.2, may_stop=True))
    line.send(submit("a", ServiceClass.INTERACTIVE))
    assert line.stopped.wait(5)
    assert len(line.receive(1)) == 1


@pytest.mark.parametrize(
    ("step", "service_class"),
    [
        (StepUnderWay(0.0, 0.2, may_stop=True), ServiceClass.STANDARD),
        (StepUnderWay(0.0, 0.2, may_stop=False), ServiceClass.INTERACTIVE),
        (StepUnderWay(-0.15, 0.2, may_stop=True), ServiceClass.INTERACTIVE),
        (StepUnderWay(0.0, 0.02, may_stop=True), ServiceClass.INTERACTIVE),
        (None, ServiceClass.INTERACTIVE),
    ],
    ids=["not urgent", "spared", "mostly done", "short", "no step"],
)
def test_other_steps_run_to_their_end(line: Line, step: StepUnderWay | None, service_class: ServiceClass) -> None:
    line.inbox.watch(step)
    line.send(submit("a", service_class), Cancel("b"))
    assert len(line.receive(2)) == 2
    assert not line.stopped.is_set()


def test_an_alarm_wakes_the_loop_and_is_told_once(line: Line) -> None:
    """An out-of-band byte stands for a pressure event: both are exceptional conditions of a file."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as alarm:
        system, _ = server.accept()
        with system:
            assert line.inbox.receive(0.01, urgent=[alarm.fileno()]) == []
            assert not line.inbox.is_alarmed
            system.send(b"!", socket.MSG_OOB)
            assert line.inbox.receive(60.0, urgent=[alarm.fileno()]) == []
            assert line.inbox.is_alarmed
            line.inbox.receive(0, urgent=[alarm.fileno()])
            assert not line.inbox.is_alarmed


def test_what_cannot_be_read_ends_the_loop(line: Line) -> None:
    line.ours.sendall(b"\x04\x00\x00\x00what")
    with pytest.raises(Exception, match=r".+"):
        line.inbox.receive(5.0)
    line.inbox._messages.append(EOFError())  # the thread has ended: for the fixture
