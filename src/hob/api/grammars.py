"""Structured output as clients ask for it, in the one notation that the engine knows: Lark, from the rule `start`.

    response_format   {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}
    regex             the whole output matches it
    choice            the output is one of these texts
    grammar           a Lark grammar as llguidance reads it, with a rule `start`

What cannot be enforced is refused, never ignored: here if it is no schema at all, by the engine process if it is one
that llguidance does not do. JSON comes in one line with one space after ',' and ':'; left to themselves, small models
lose their way in white space.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from hob.api.body import show
from hob.api.schema import Sampling
from hob.errors import InvalidRequest
from hob.request import MAX_GRAMMAR_BYTES, Grammar

MAX_CHOICES = 1024
_JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
_SPECIAL = re.compile(r"\\.|[/\n]", re.DOTALL)
_ESCAPES = {
    "/": r"\/",
    "\n": r"\n",
    "\\\n": r"\n",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
}
FIELDS = ("response_format", "regex", "choice", "grammar")


def grammar_of(body: Sampling) -> Grammar | None:
    """What the body's output must match. Raises InvalidRequest; two fields at once contradict."""
    given = [name for name in FIELDS if getattr(body, name) is not None and not _is_text(name, getattr(body, name))]
    if len(given) > 1:
        raise InvalidRequest(f"fields {' and '.join(given)} are given. Expected one of them.", param=given[1])
    if not given:
        return None
    if body.regex is not None:
        return _of_regex(body.regex)
    if body.choice is not None:
        return _of_choice(body.choice)
    if body.grammar is not None:
        return _checked(body.grammar, "grammar")
    return _of_format(body.response_format)


def of_schema(schema: Any, param: str) -> Grammar:
    """JSON that a schema describes."""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"field '{param}' is {show(schema)}. Expected a JSON schema, an object.", param=param)
    if "x-guidance" in schema:
        raise InvalidRequest(f"field '{param}' has 'x-guidance', which may loosen the schema", param=param)
    try:
        text = msgspec.json.encode(schema | {"x-guidance": _JSON_OPTIONS}).decode()
    except RecursionError:
        raise InvalidRequest(f"field '{param}' is not accepted: it is nested too deeply", param=param) from None
    return _checked(f"start: %json {text}", param)


def _is_text(name: str, value: Any) -> bool:
    return name == "response_format" and value == {"type": "text"}


def _of_format(value: Any) -> Grammar:
    param = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object" and len(value) == 1:
        return of_schema({"type": "object"}, param)
    if kind != "json_schema" or set(value) != {"type", "json_schema"} or not isinstance(value["json_schema"], dict):
        raise InvalidRequest(
            f'field \'{param}\' is {show(value)}. Expected {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.',
            param=param,
        )
    if unknown := sorted(set(value["json_schema"]) - {"name", "description", "schema", "strict"}):
        raise InvalidRequest(f"unknown field '{param}.json_schema.{unknown[0]}'", param=f"{param}.json_schema")
    return of_schema(value["json_schema"].get("schema"), f"{param}.json_schema.schema")


def _of_regex(pattern: str) -> Grammar:
    """Between slashes, so slashes and line breaks in it are escaped. \\d and \\w are ASCII's, as in JavaScript."""
    return _checked(f"start: /{_SPECIAL.sub(_escape, pattern)}/", "regex")


def _escape(found: re.Match[str]) -> str:
    return _ESCAPES.get(found[0], found[0])


def _of_choice(choices: list[str]) -> Grammar:
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise InvalidRequest(
            f"field 'choice' has {len(choices)} texts. Expected 1 to {MAX_CHOICES}, none empty.", param="choice"
        )
    return _checked("start: " + " | ".join(msgspec.json.encode(text).decode() for text in choices), "choice")


def _checked(lark: str, param: str) -> Grammar:
    size = len(lark.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"field '{param}' makes {size:,} bytes. Expected at most {MAX_GRAMMAR_BYTES:,}.", param=param
        )
    return Grammar(lark, param)
