"""Tools a model may call: what the request says of them, and the grammar that makes a call sure to fit.

tool_choice   "auto"       the model decides; its text is searched for calls (tool_calls.py). A function that is
                           `strict` makes the whole reply follow a grammar: text, or calls that fit
              "required"   a grammar: one call or several, of any function
              {"function"} a grammar: calls of that one
              "none"       as if there were no tools
parallel_tool_calls false  at most one call
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from hob.api.body import show
from hob.api.grammars import of_schema
from hob.api.schema import ChatRequest, Tool
from hob.errors import InvalidRequest
from hob.request import Grammar

MAX_TOOLS = 128
MAX_CALLS = 8
"""Most calls of a reply that a grammar makes: a small model would go on for ever."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY = {"type": "object"}
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request offers, and how the reply is held to it."""

    described: list[dict[str, Any]]
    """As a chat template wants them. Empty: none are offered."""
    names: frozenset[str] = frozenset()
    grammar: Grammar | None = None


NO_TOOLS = Tools([])


def tools_of(body: ChatRequest) -> Tools:
    """Check and read the fields. Raises InvalidRequest naming the one at fault."""
    choice = body.tool_choice
    if not body.tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            value = getattr(body, name)
            if value is not None and not (name == "tool_choice" and value in ("none", "auto")):
                raise InvalidRequest(f"field '{name}' is {show(value)}, but there are no 'tools'", param=name)
        return NO_TOOLS
    known = _checked(body.tools)
    if choice == "none":
        return NO_TOOLS
    wanted = _wanted(choice, known)
    offered, names = described(body.tools), frozenset(known)
    most = 1 if body.parallel_tool_calls is False else MAX_CALLS
    if wanted is not None:
        return Tools(offered, names, _calls_grammar([known[name] for name in wanted], most, is_required=True))
    if any(tool.function.strict for tool in body.tools):
        return Tools(offered, names, _calls_grammar(list(known.values()), most, is_required=False))
    return Tools(offered, names)


def described(tools: list[Tool]) -> list[dict[str, Any]]:
    """Tools as a chat template wants them. Raises InvalidRequest."""
    _checked(tools)
    found: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in tools]
    for tool in found:
        tool["function"] = {k: v for k, v in tool["function"].items() if v is not None and k != "strict"}
    return found


def _checked(tools: list[Tool]) -> dict[str, Tool]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"field 'tools' has {len(tools)} tools. Expected at most {MAX_TOOLS}.", param="tools")
    known: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        name, param = tool.function.name, f"tools[{i}].function.name"
        if not _NAME.fullmatch(name) or name in known:
            raise InvalidRequest(
                f"field '{param}' is {show(name)}. Expected 1 to 64 letters, digits, '.', '_' and '-', each name once.",
                param=param,
            )
        known[name] = tool
    return known


def _wanted(choice: Any, known: dict[str, Tool]) -> list[str] | None:
    """Names of the functions of which one must be called. None: none must."""
    if choice is None or choice == "auto":
        return None
    if choice == "required":
        return list(known)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in known:
        raise InvalidRequest(
            f"field 'tool_choice' is {show(choice)}. Expected none, auto, required, or "
            f'{{"type": "function", "function": {{"name": ...}}}} with one of: {", ".join(known)}.',
            param="tool_choice",
        )
    return [name]


def _calls_grammar(tools: list[Tool], most: int, *, is_required: bool) -> Grammar:
    """Calls between their tags; where none is required, any text that opens no tag instead, or before them."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or _ANY},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    definitions = _lift_definitions(calls)
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most, **definitions}
    calls_rule = of_schema(schema, "tools").lark.removeprefix("start: ")
    if is_required:
        return Grammar(f'start: "{OPEN}" calls "{CLOSE}"\ncalls: {calls_rule}', "tools")
    return Grammar(
        f'start: TEXT | opened calls "{CLOSE}"\ncalls: {calls_rule}\n'
        f"opened[lazy]: /(.|\\n)*{OPEN}/\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/",
        "tools",
    )


def _lift_definitions(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """References count from a schema's root, so the functions' definitions move there, under names of their own."""
    lifted: dict[str, Any] = {}
    for i, call in enumerate(calls):
        parameters = call["properties"]["arguments"]
        for key in ("$defs", "definitions"):
            if isinstance(parameters, dict) and isinstance(parameters.get(key), dict):
                parameters = {**_repoint(parameters, f"#/{key}/", f"#/$defs/{i}."), key: None}
                moved = _repoint(call["properties"]["arguments"][key], f"#/{key}/", f"#/$defs/{i}.")
                lifted |= {f"{i}.{name}": schema for name, schema in moved.items()}
                del parameters[key]
        call["properties"]["arguments"] = parameters
    return {"$defs": lifted} if lifted else {}


def _repoint(value: Any, old: str, new: str) -> Any:
    if isinstance(value, list):
        return [_repoint(item, old, new) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: new + item.removeprefix(old)
        if key == "$ref" and isinstance(item, str) and item.startswith(old)
        else _repoint(item, old, new)
        for key, item in value.items()
    }
