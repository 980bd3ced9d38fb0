"""Output that must match a grammar: which tokens each constrained sequence may take next, computed beside the step.

    Grammars.compile(grammar) --Future--> Matcher        once, in a thread of its class, as the request arrives
    Masks.begin --thread--> bits for `Engine.sample`     while the step's forward pass runs without the GIL
    Masks.accept(tokens)                                 each matcher moves on; Ended says who is complete or broken,
                                                         in the caller's thread: to wake another takes 0.14 ms a step

Where tokens are guessed ahead, a copy of the matcher goes on by them, and a row follows for each.

The matchers are `llguidance`'s. It gets the bytes of each token and decides on bytes; no text is made here. Tokens are
never forced upon the model (`no_forcing`): any split of the allowed bytes may be drawn, so nothing needs a tokenizer.

Fails closed: a matcher that cannot say which tokens are allowed ends its sequence with an error. A grammar is somebody
else's program: the limits bound what a row of it may cost, and the threads have stacks deep enough for the longest
chain of rules that MAX_GRAMMAR_BYTES can hold, which on an ordinary stack ends the process. Taking in a token needs no
such stack: 128 KB do for whatever compiles.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hob.errors import InvalidRequest
from hob.request import MAX_GRAMMAR_BYTES, Grammar, ServiceClass

if TYPE_CHECKING:
    import llguidance

STACK_BYTES = 256 << 20
"""Of a thread; only what is used becomes resident. A rule takes 4 KB of it, and 8 bytes of a grammar."""
LIMITS: dict[str, Any] = {
    "max_items_in_row": 500,
    "step_max_items": 10_000,
    "step_lexer_fuel": 100_000,
    "initial_lexer_fuel": 500_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""What one grammar may cost: some milliseconds a token at worst, where ordinary schemas take some microseconds."""
MAX_SHOWN_CHARS = 200
BACKGROUND_NICE = 10
_SHOWN_SOURCE = re.compile(r"\s*\d+ \||\s*\^|<non-verbose/>")
"""Lines in which llguidance shows the grammar; ours differs from what the caller wrote."""
_NEGATIVE = re.compile(r'(?<![\w"])-\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')
LEAST = -1e18
"""Numbers of schemas below it are refused: of -2^63, and of what is cut to it (-1e19), llguidance's expression for a
range of integers (1.7 to 1.9) calls itself without end, on any stack."""
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


class Matcher:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def fork(self) -> Matcher:
        """Another sequence at the same place."""
        return Matcher(self._matcher.deep_copy(), self._param)

    def fill(self, row: NDArray[np.uint8]) -> InvalidRequest | None:
        """Set the bits of the tokens that may come next, or say why that is not known."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return self.error if self._matcher.is_error() or row.any() else self._refusal("it allows no token here")

    def accept(self, token_id: int) -> bool:
        """Take in a token that was drawn. Whether the output is complete: nothing may follow."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> InvalidRequest | None:
        """Why the grammar cannot be enforced any further."""
        return self._refusal(self._matcher.get_error()) if self._matcher.is_error() else None

    def _refusal(self, reason: str) -> InvalidRequest:
        lines = [line.strip() for line in reason.splitlines() if not _SHOWN_SOURCE.match(line)]
        shown = " ".join(filter(None, lines))[:MAX_SHOWN_CHARS]
        return InvalidRequest(f"field '{self._param}' cannot be enforced: {shown}", param=self._param)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a constrained sequence in a step, if it is not to go on."""

    at: int
    """With which of the tokens that it was given."""
    error: InvalidRequest | None
    """None: its output is complete."""


class Grammars:
    """Compiles grammars over one vocabulary. Importing the library and building the trie of tokens (16 MB for 49k of
    them, 0.2 s) wait for the first grammar.

    Each class has a thread: a grammar may take seconds, and who waits at a screen does not wait for a background job's.
    """

    def __init__(self, tokens: Many[bytes], stop_token_ids: Many[int]) -> None:
        self._tokens: Many[bytes] = tokens
        self._stop_token_ids = list(stop_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._building = threading.Lock()
        self._compilers: dict[ServiceClass, ThreadPoolExecutor] = {}

    def compile(self, grammar: Grammar, service_class: ServiceClass = ServiceClass.STANDARD) -> Future[Matcher]:
        """A matcher at the grammar's start, or InvalidRequest: only one that can say what its first token may be."""
        if service_class not in self._compilers:
            is_background = service_class is ServiceClass.BACKGROUND
            self._compilers[service_class] = _thread("grammar", BACKGROUND_NICE if is_background else 0)
        return self._compilers[service_class].submit(self._compile, grammar)

    def _compile(self, grammar: Grammar) -> Matcher:
        import llguidance

        if len(grammar.lark.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"a grammar has more than {MAX_GRAMMAR_BYTES:,} bytes", param=grammar.param)
        numbers = _NEGATIVE.findall(grammar.lark) if "%json" in grammar.lark else []
        if endless := next((number for number in numbers if float(number) < LEAST), None):
            raise InvalidRequest(
                f"field '{grammar.param}' cannot be enforced: it holds {endless:.40}. Expected numbers from -10^18 up.",
                param=grammar.param,
            )
        with self._building:
            self._tokenizer = self._tokenizer or self._build()
        limits = llguidance.LLParserLimits(**LIMITS)
        made = llguidance.LLMatcher(self._tokenizer, grammar.lark + _OPTIONS, log_level=0, limits=limits)
        matcher = Matcher(made, grammar.param)
        first = np.zeros(mask_bytes(len(self._tokens)), np.uint8)
        if (error := matcher.error or matcher.fill(first)) is not None:
            raise error
        if warnings := made.get_grammar_warnings():
            raise matcher._refusal("; ".join(warnings))
        return matcher

    def _build(self) -> llguidance.LLTokenizer:
        import llguidance

        ends = self._stop_token_ids or [len(self._tokens)]
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(self._tokens, ends[0])), eos_token=ends)


class _Tokens:
    """The vocabulary as llguidance asks for it, and one id past it, which ends a text where no token of the model does.

    Nothing ever draws that one.
    """

    bos_token_id = None

    def __init__(self, tokens: Many[bytes], end_id: int) -> None:
        self.eos_token_id = end_id
        self.tokens = [raw or b"\xff<|%d|>" % i for i, raw in enumerate([*tokens, b""])]
        self.special_token_ids = [i for i, raw in enumerate(self.tokens) if raw.startswith(b"\xff<|")]

    def __call__(self, text: bytes) -> list[int]:
        """Would be asked for the tokens of forced text; it is not, see `_OPTIONS`."""
        raise AssertionError("a grammar wanted to force tokens")


class Masks:
    """The masks of one step after the other, made in a thread of their own."""

    def __init__(self, vocab_size: int) -> None:
        self._num_bytes = mask_bytes(vocab_size)
        self._thread = _thread("mask")
        self._errors: list[list[InvalidRequest | None]] = []
        """Of each sequence's rows, as far as they can count."""

    def begin(self, matchers: Many[Matcher | None], drafts: Many[list[int]]) -> Future[NDArray[np.uint8]]:
        """One row for each draw of the step: of a sequence, the next token's and one after each guess at it.

        A row without a matcher allows everything.
        """
        return self._thread.submit(self._fill, matchers, drafts)

    def accept(self, matchers: Many[Matcher | None], token_ids: Many[list[int]]) -> list[Ended | None]:
        """Move on by the step's tokens, as many of each sequence as hold. None: the sequence goes on.

        Call once the step's masks are there.
        """
        return [
            None if matcher is None else _accept_along(matcher, errors, tokens)
            for matcher, errors, tokens in zip(matchers, self._errors, token_ids, strict=True)
        ]

    def _fill(self, matchers: Many[Matcher | None], drafts: Many[list[int]]) -> NDArray[np.uint8]:
        rows = np.full((sum(1 + len(guesses) for guesses in drafts), self._num_bytes), 0xFF, np.uint8)
        self._errors = []
        at = 0
        for matcher, guesses in zip(matchers, drafts, strict=True):
            own = rows[at : at + 1 + len(guesses)]
            self._errors.append([] if matcher is None else _fill_along(matcher, guesses, own))
            at += len(own)
        return rows


def _fill_along(matcher: Matcher, guesses: list[int], rows: NDArray[np.uint8]) -> list[InvalidRequest | None]:
    """Masks of a sequence, from where it stands on along the guesses, until one cannot be drawn or ends the output."""
    errors: list[InvalidRequest | None] = []
    ahead = matcher.fork() if guesses else matcher
    for row, guess in zip(rows, [*guesses, None], strict=True):
        row[:] = 0
        errors.append(ahead.fill(row))
        if errors[-1] is not None:
            row[:] = 0xFF  # something must be drawn for it; `accept` says that it does not count
            break
        if guess is None or not row[guess // 8] >> guess % 8 & 1 or ahead.accept(guess):
            break
    return errors


def _accept_along(matcher: Matcher, errors: list[InvalidRequest | None], tokens: list[int]) -> Ended | None:
    for at, (token_id, error) in enumerate(zip(tokens, errors, strict=False)):
        is_complete = error is None and matcher.accept(token_id)
        error = error or (matcher.error if is_complete else None)
        if error is not None or is_complete:
            return Ended(at, error)
    return None


def mask_bytes(vocab_size: int) -> int:
    """Bytes of a row as llguidance fills it: whole 32-bit words, for the vocabulary and one id past it."""
    return (vocab_size + 1 + 31) // 32 * 4


def _be_nicer(by: int) -> None:
    """Of the calling thread alone."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + by)


def _thread(name: str, nice: int = 0) -> ThreadPoolExecutor:
    """One thread with a deep stack, which leaves the cores to others if it is nice."""
    executor = ThreadPoolExecutor(1, f"hob-{name}")
    before = threading.stack_size(STACK_BYTES)
    try:
        executor.submit(_be_nicer, nice).result()
    finally:
        threading.stack_size(before)
    return executor
