"""Finds calls in a reply as it comes: text outside their tags is text, what is between them are calls.

    <tool_call>[{"name": "f", "arguments": {"a": 1}}, ...]</tool_call>      one list, or an object in each pair of tags

A call begins once its name is read, and its arguments are passed on as they are written. What looks like a call and is
none (another name, no JSON) is text after all. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

import msgspec

from hob.api.generate import Delta
from hob.api.tools import CLOSE, OPEN, Tools
from hob.api.wire import FINISH
from hob.request import FinishReason

_HEAD = re.compile(
    r'\s*[\[,]?\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_MAX_HEAD_CHARS = 512
_END = re.compile(r"\s*\}\s*(?:(,)|\]?\s*" + re.escape(CLOSE) + r"\s*)")
_MAX_END_CHARS = 64


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a reply: text, or a piece of a call."""

    text: str = ""
    call: int | None = None
    """Which call it belongs to, counted from 0."""
    call_id: str = ""
    """At the call's beginning."""
    name: str = ""
    """At the call's beginning."""
    arguments: str = ""
    ends_call: bool = False


class CallFinder:
    """One choice's reply. `push` text as it comes, `flush` at its end."""

    def __init__(self, names: frozenset[str]) -> None:
        self.num_calls = 0
        self._names = names
        self._read = self._outside
        self._held = ""
        """Read, but not known what it is."""
        self._shown_if_none = ""
        """What `_held` would be as text: with the tag before it."""
        self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, text: str) -> list[Part]:
        """Take in text; give what is certain. White space between calls says nothing."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._read(parts):
            pass
        return [part for part in parts if not (self.num_calls and part.text.isspace())]

    def flush(self) -> list[Part]:
        """The reply has ended: what was held back is text, unless it belongs to a call."""
        held = self._shown_if_none + self._held if self._read in (self._outside, self._before_call) else ""
        self._held = self._shown_if_none = ""
        return [Part(text=held)] if held and not (self.num_calls and held.isspace()) else []

    def _outside(self, parts: list[Part]) -> bool:
        at = self._held.find(OPEN)
        is_open = at >= 0
        shown = self._held[:at] if is_open else self._held[: len(self._held) - _num_begun(self._held)]
        if shown:
            parts.append(Part(text=shown))
        self._held = self._held[len(shown) :].removeprefix(OPEN)
        if is_open:
            self._shown_if_none, self._read = OPEN, self._before_call
        return is_open

    def _before_call(self, parts: list[Part]) -> bool:
        found = _HEAD.match(self._held)
        if found is None:
            if len(self._held) <= _MAX_HEAD_CHARS and CLOSE not in self._held:
                return False
            return self._is_no_call(parts)
        name = _decoded(found[1])
        if name not in self._names:
            return self._is_no_call(parts)
        parts.append(Part(call=self.num_calls, call_id="call_" + secrets.token_hex(12), name=name))
        self._held, self._shown_if_none, self._read = self._held[found.end() :], "", self._arguments
        return True

    def _is_no_call(self, parts: list[Part]) -> bool:
        if shown := self._shown_if_none + self._held:
            parts.append(Part(text=shown))
        self._held, self._shown_if_none, self._read = "", "", self._outside
        return False

    def _arguments(self, parts: list[Part]) -> bool:
        """Up to the brace that closes the object."""
        for i, char in enumerate(self._held):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            else:
                self._depth += (char in "{[") - (char in "}]")
                if self._depth == 0:
                    parts.append(Part(call=self.num_calls, arguments=self._held[: i + 1], ends_call=True))
                    self._held, self._read = self._held[i + 1 :], self._after_call
                    self.num_calls += 1
                    return True
        parts.append(Part(call=self.num_calls, arguments=self._held))
        self._held = ""
        return False

    def _after_call(self, parts: list[Part]) -> bool:
        found = _END.match(self._held)
        if found is None:
            if len(self._held) > _MAX_END_CHARS:
                self._held, self._read = "", self._outside  # rubbish behind a good call
            return False
        self._held = self._held[found.end() :]
        self._read = self._before_call if found[1] else self._outside
        return True


def finder_of(tools: Tools) -> CallFinder | None:
    """For a choice of a reply. None: there is nothing to find."""
    return CallFinder(tools.names) if tools.names else None


def parts_of(finder: CallFinder | None, delta: Delta) -> list[Part]:
    """What a delta adds."""
    if finder is None:
        return [Part(text=delta.text)] if delta.text else []
    parts = finder.push(delta.text)
    return parts + finder.flush() if delta.finish_reason is not None else parts


def finish_of(finder: CallFinder | None, delta: Delta) -> str:
    """OpenAI's reason for the end of a choice."""
    is_call = finder is not None and finder.num_calls and delta.finish_reason is FinishReason.STOP
    return "tool_calls" if is_call else FINISH[delta.finish_reason]


def _num_begun(text: str) -> int:
    """Length of the longest end of a text with which the tag begins."""
    return next(length for length in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:length]))


def _decoded(text: str) -> str:
    try:
        return str(msgspec.json.decode(text))
    except msgspec.DecodeError:
        return ""
