"""Calls found in text that comes in any pieces."""

from __future__ import annotations

import json
import random

import pytest

from hob.api.tool_calls import CallFinder

NAMES = frozenset({"add", "get_weather"})


def found(text: str, cut: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls of a reply; `cut`: the seed of its pieces, None for one character each."""
    rng = random.Random(cut)
    finder = CallFinder(NAMES)
    parts = []
    while text:
        length = 1 if cut is None else rng.randint(1, 12)
        parts += finder.push(text[:length])
        text = text[length:]
    parts += finder.flush()
    calls: list[list[str]] = []
    shown = ""
    for part in parts:
        if part.call is None:
            shown += part.text
        elif part.call_id:
            assert part.call == len(calls)
            calls.append([part.name, ""])
        else:
            calls[part.call][1] += part.arguments
    return shown, [(name, arguments) for name, arguments in calls]


ADD = '{"name": "add", "arguments": {"a": [1, {"b": "}\\"]"}], "c": ""}}'
ARGUMENTS = json.dumps(json.loads(ADD)["arguments"])
WEATHER = '{ "name":"get_weather" ,"parameters": {} }'
REPLIES = {
    "text": ("Two < three, <tool_cal is no tag", "Two < three, <tool_cal is no tag", []),
    "one in a list": (f"<tool_call>[{ADD}]</tool_call>", "", [("add", ARGUMENTS)]),
    "one": (f"Well. <tool_call>\n{ADD}\n</tool_call>\n", "Well. ", [("add", ARGUMENTS)]),
    "two in a list": (f"<tool_call>[{ADD}, {WEATHER}]</tool_call>", "", [("add", ARGUMENTS), ("get_weather", "{}")]),
    "two": (
        f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{ADD}</tool_call>Done.",
        "Done.",
        [("get_weather", "{}"), ("add", ARGUMENTS)],
    ),
    "another name": ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    "no JSON": ("<tool_call>add(1, 2)</tool_call> and on", None, []),
    "cut in the head": ('<tool_call>[{"name": "ad', None, []),
    "cut in the tag": ("so <tool_c", None, []),
    "cut in the arguments": ('<tool_call>[{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
}


@pytest.mark.parametrize(("reply", "text", "calls"), REPLIES.values(), ids=REPLIES)
def test_calls_are_found_wherever_the_pieces_are_cut(
    reply: str, text: str | None, calls: list[tuple[str, str]]
) -> None:
    expected = (reply if text is None else text, calls)
    assert found(reply) == expected
    for seed in range(50):
        assert found(reply, seed) == expected
