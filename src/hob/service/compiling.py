"""Requests whose grammar is being compiled: they enter the scheduler when it is, and not before.

A grammar takes a thread 1 ms, a large one 100; the steps of everyone else go on meanwhile, and nobody waits for it
who has something else to do.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from hob.engine.grammar import Grammars, Masks, Matcher
from hob.errors import HobError, InternalError, Overloaded
from hob.messages import Vocabulary
from hob.request import Request

MAX_PENDING = 1024
"""Each may be 64 KB of text, and is in no queue of the scheduler's yet."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request that may enter, with a matcher for each of its samples, or why it may not."""

    request: Request
    matchers: list[Matcher]
    error: HobError | None = None


class Compiling:
    """The requests that wait for their grammar, in the order in which they came."""

    def __init__(self) -> None:
        self.masks: Masks | None = None
        """None: no grammar has come yet."""
        self._grammars: Grammars | None = None
        self._pending: dict[str, tuple[Request, Future[Matcher]]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a request waits."""
        return bool(self._pending)

    def learn(self, vocabulary: Vocabulary) -> None:
        """The tokens that grammars are about."""
        self._grammars = Grammars(vocabulary.tokens, vocabulary.stop_token_ids)
        self.masks = Masks(len(vocabulary.tokens))

    def begin(self, request: Request) -> None:
        """Compile the request's grammar; `ready` gives it back. Raises Overloaded where too many wait already."""
        if self._grammars is None or request.grammar is None:
            raise InternalError("a grammar came before the vocabulary")
        if len(self._pending) >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING} grammars wait to be compiled, which is the limit", retry_after_s=2.0)
        self._pending[request.request_id] = request, self._grammars.compile(request.grammar, request.service_class)

    def cancel(self, request_id: str) -> None:
        """The client left. What is being compiled is compiled to its end."""
        if found := self._pending.pop(request_id, None):
            found[1].cancel()

    def ready(self, patience_s: float) -> list[Compiled]:
        """Those that wait no longer; one of them is waited for so long at most."""
        if self._pending and patience_s:
            wait([made for _, made in self._pending.values()], patience_s, FIRST_COMPLETED)
        done = [request_id for request_id, (_, made) in self._pending.items() if made.done()]
        return [_compiled(*self._pending.pop(request_id)) for request_id in done]


def _compiled(request: Request, made: Future[Matcher]) -> Compiled:
    try:
        matcher = made.result()
    except HobError as error:
        return Compiled(request, [], error)
    except Exception as error:
        return Compiled(request, [], InternalError(f"the grammar could not be compiled: {error!r:.200}"))
    return Compiled(request, [matcher, *(matcher.fork() for _ in range(request.num_samples - 1))])
