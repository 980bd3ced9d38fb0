"""Structured output as clients ask for it, in the one notation that the engine knows: Lark, from the rule `start`.

    response_format   {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}
    regex             the whole output matches it
    choice            the output is one of these texts
    grammar           a Lark grammar as llguidance reads it, with a rule `start`

What cannot be enforced is refused, never ignored: here if it is no schema at all or has integers that llguidance would
take for others, by the engine process if it is one that llguidance does not do. JSON comes in one line with one space
after ',' and ':'; left to themselves, small models lose their way in white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
_EXACT = frozenset({"const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
"""Words of a schema whose integers must be met to the last digit."""
_LONG = re.compile(r'(?<![\w".])-?\d{16,}(?![\w".])')
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
        if "%json" in body.grammar:
            _check_exact((int(digits[:40]) for digits in _LONG.findall(body.grammar)), "grammar")
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
        _check_exact(_demanded(schema), param)
    except RecursionError:
        raise InvalidRequest(f"field '{param}' is not accepted: it is nested too deeply", param=param) from None
    return _checked(f"start: %json {text}", param)


def _demanded(schema: Any, is_exact: bool = False) -> Iterator[int]:
    """Integers that a schema demands something of, not those of its defaults and examples."""
    match schema:
        case bool():
            return
        case int() if is_exact:
            yield schema
        case list():
            for each in schema:
                yield from _demanded(each, is_exact)
        case dict():
            for word, value in schema.items():
                yield from _demanded(value, is_exact or word in _EXACT)


def _check_exact(integers: Iterable[int], param: str) -> None:
    """llguidance keeps each as a double, cut to 64 bits: some become other integers, and those would be enforced."""
    for integer in integers:
        kept = min(int(float(min(max(integer, -(1 << 63)), 1 << 63))), (1 << 63) - 1)
        if kept != integer:
            raise InvalidRequest(
                f"field '{param}' cannot be enforced: it holds {str(integer)[:40]}, which would be taken for {kept}. "
                f"Expected integers of at most 2^53 ({1 << 53}), which are kept exactly.",
                param=param,
            )


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
