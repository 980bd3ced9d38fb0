"""The outputs of one request on their way from the engine's reports to who asked: an iterator over a mailbox.

    put(output) --> waits in the mailbox --> `async for output in outputs`
              \\--> straight to a sink, if the reader gave one and is waiting just now

The first way is all there is to know: it keeps the order, raises errors and counts ends. The second saves it the task
switch per token. It knows nothing of processes and of text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from hob.errors import EngineUnavailable, HobError, error_from_name
from hob.request import FinishReason, Place, Request, SequenceOutput

Sink = Callable[[SequenceOutput], bool]
"""Takes an output, or says False: then it comes through the iterator."""


class Outputs:
    """An async iterator over what a request brings, until each of its sequences has ended. See `Backend.submit`.

    begin: hands the request to the engine; awaited when the iteration begins. end: called once when it ends, however
    it does, with whether all sequences had ended; if not, the request is to be cancelled.
    """

    def __init__(
        self, request: Request, begin: Callable[[Outputs], Awaitable[None]], end: Callable[[Outputs, bool], None]
    ) -> None:
        self.request = request
        self._begin = begin
        self._end = end
        self._is_begun = False
        self._is_closed = False
        self._num_left = max(request.num_samples, len(request.continuations))
        self._items: deque[SequenceOutput | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self.place: Place | None = None
        """Where the request stood when it came, if it had to wait."""
        self.num_kept: int | None = None
        """See messages.Cancel: set by who leaves early with what it wanted."""

    def put(self, item: SequenceOutput | Exception) -> None:
        """Deliver an output, or the error that ends the request. From the event loop's thread."""
        if isinstance(item, SequenceOutput) and item.place is not None:
            self.place = item.place
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)  # for `opening`
            return
        waiter = self._waiter
        if waiter is None or waiter.done():  # the reader is still at work on what came before
            self._items.append(item)
        elif self._sink is None or not self._is_sunk(item, self._sink):
            self._items.append(item)
            waiter.set_result(None)

    def after(self, gate: Callable[[Request], Awaitable[None]]) -> Outputs:
        """Await `gate` before the request is handed to the engine; what it raises is what the iteration raises."""
        begin = self._begin

        async def gated(outputs: Outputs) -> None:
            await gate(outputs.request)
            await begin(outputs)

        self._begin = gated
        return self

    async def opening(self) -> Place | None:
        """Begin, and wait for what is known first: the request's place, or its first output (None).

        Raises what keeps it from beginning, as the iteration would.
        """
        try:
            await self._begin_once()
            if not self._items and self.place is None:
                await self._arrival()
        except BaseException:  # cancellation too: nobody reads on
            self.close()
            raise
        return None if self._items else self.place

    def divert(self, sink: Sink) -> None:
        """From now on, offer outputs to `sink` first whenever the reader waits; but not the last of a sequence."""
        self._sink = sink

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The next output. Raises the error that ended the request."""
        try:
            await self._begin_once()
            if self._num_left == 0 or self._is_closed:
                raise StopAsyncIteration
            while not self._items:
                await self._arrival()
            item = self._items.popleft()
            error = item if isinstance(item, Exception) else _error_of(item)
            if error is not None:
                raise error
        except BaseException:  # cancellation too: nobody reads on
            self.close()
            raise
        assert isinstance(item, SequenceOutput)
        self._num_left -= item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Leave: cancels the request unless all its sequences have ended. Again: nothing."""
        self.close()

    def close(self) -> None:
        """As `aclose`."""
        if self._is_begun and not self._is_closed:
            self._end(self, self._num_left == 0)
        self._is_closed = True

    async def _begin_once(self) -> None:
        if not self._is_begun:
            self._is_begun = True
            await self._begin(self)

    async def _arrival(self) -> None:
        """Wait until something comes."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _is_sunk(self, item: SequenceOutput | Exception, sink: Sink) -> bool:
        if isinstance(item, Exception) or item.finish_reason is not None or item.error is not None:
            return False
        try:
            return sink(item)
        except Exception as error:  # a bug of the reader's: raised where it reads, not where all reports come in
            self._items.append(error)
            return False


def _error_of(output: SequenceOutput) -> HobError | None:
    if output.error is not None:
        error = output.error
        return error_from_name(error.name, error.message, error.retry_after_s, error.param)
    if output.finish_reason is FinishReason.CANCELLED:
        return EngineUnavailable("the request was cancelled by the service", retry_after_s=1.0)
    return None
