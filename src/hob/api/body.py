"""From bytes to a typed body, with errors that name the field, its value and what was expected."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from hob.api.schema import NEUTRAL
from hob.errors import InvalidRequest

T = TypeVar("T", bound=msgspec.Struct)

_decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}
_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_MAX_SHOWN = 80


def parse_body(raw: bytes, schema: type[T]) -> T:
    """Decode and validate. Raises InvalidRequest with `param` set to the field's path, e.g. 'messages[0].role'."""
    decoder = _decoders.get(schema)
    if decoder is None:
        decoder = _decoders[schema] = msgspec.json.Decoder(schema)
    try:
        return decoder.decode(raw)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise _explain(raw, str(error), schema) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}. It has {len(raw):,} bytes.") from None
    except RecursionError:
        raise InvalidRequest("the body is not accepted: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise _not_utf8(raw) from None


def show(value: Any) -> str:
    """A value as JSON, cut to a length that fits a message."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _not_utf8(raw: bytes) -> InvalidRequest:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:  # msgspec's own position counts from the start of the string, not of the body
        where = f": byte 0x{raw[error.start]:02x} at position {error.start}"
    else:
        where = ""
    return InvalidRequest(f"the body is not valid UTF-8{where}. Expected JSON in UTF-8.")


def _unknown(name: str, path: str, schema: type[msgspec.Struct]) -> InvalidRequest:
    full = f"{path}.{name}" if path else name
    if path:
        return InvalidRequest(f"unknown field '{full}'", param=full)
    known = [f.encode_name for f in msgspec.structs.fields(schema) if f.encode_name not in NEUTRAL]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
    return InvalidRequest(f"unknown field '{full}'. {hint}", param=full)


def _explain(raw: bytes, message: str, schema: type[msgspec.Struct]) -> InvalidRequest:
    found = _PATH.search(message)
    path = found.group(1) if found else ""
    what = message[: found.start()] if found else message
    if unknown := _UNKNOWN.search(what):
        return _unknown(unknown.group(1), path, schema)
    if missing := _MISSING.search(what):
        name = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return InvalidRequest(f"field '{name}' is missing", param=name)
    if not path:
        return InvalidRequest(f"the body is wrong: {what}. Expected a JSON object.")
    value = _look_up(raw, path)
    shown = f" is {show(value)}" if value is not msgspec.UNSET else ""
    return InvalidRequest(f"field '{path}'{shown}. {what.replace('`', '')}.", param=path)


def _look_up(raw: bytes, path: str) -> Any:
    """The value at msgspec's path, or UNSET where the path is not exact ('[...]' for a key)."""
    try:
        value = msgspec.json.decode(raw)
        for name, index in _STEP.findall(path):
            value = value[name] if name else value[int(index)]
    except (KeyError, IndexError, TypeError, ValueError, msgspec.DecodeError, RecursionError):
        return msgspec.UNSET
    return value
