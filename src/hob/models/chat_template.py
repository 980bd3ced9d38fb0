"""Render a chat template: Jinja2 as Hugging Face sets it up, in a sandbox, with limits.

Templates are programs out of model files. The sandbox keeps them from Python's insides and from changing what they
are given; the limits keep them from filling the memory or looping for ever: characters put out, length of any text
they build, numbers a `range` may count over all its uses, and seconds. This module knows no tokens.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hob.errors import InvalidRequest

MAX_OUTPUT_CHARS = 16 << 20
MAX_RANGE = 1 << 20
"""Numbers that all `range`s of one rendering may give together."""
MAX_RENDER_S = 5.0
MAX_SHOWN_CHARS = 200
"""Of a template's own error message."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Used where a file has no template: the commonest form, and harmless where the model does not know its tokens."""

_GROWING_METHODS = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}
"""Methods of str that make a text of any length out of a number."""
_GROWING_FILTERS = ("center", "format", "wordwrap", "urlize")
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)")
_MAX_INDENT = 64


class ChatTemplate:
    """One compiled template. Raises InvalidRequest if it does not parse."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template does not parse: {_shown(error)}. "
                "Use /v1/completions with your own prompt, or another model."
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises InvalidRequest with the template's own words, or naming the limit."""
        meter = _Meter()
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(**variables, **meter.functions()):
                num_chars += len(part)
                meter.check_chars(num_chars)
                meter.check_time()
                parts.append(part)
        except InvalidRequest:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequest(f"the model's chat template refuses: {_shown(error)}", param="messages") from error
        except (RecursionError, MemoryError) as error:
            raise InvalidRequest(f"the model's chat template ran away: {type(error).__name__}") from error
        return "".join(parts)


class _Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self._deadline_s = time.monotonic() + MAX_RENDER_S
        self._num_counted = 0

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Globals that templates expect, charged to this rendering."""
        return {"range": self.range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def range(self, *args: int) -> range:
        """Like Python's, while the budget lasts."""
        found = range(*args)
        self._num_counted += len(found)
        self.check_time()
        if self._num_counted > MAX_RANGE:
            raise InvalidRequest(f"the model's chat template counts further than {MAX_RANGE}: it was stopped")
        return found

    def check_chars(self, num_chars: int) -> None:
        """Raises InvalidRequest past the limit."""
        if num_chars > MAX_OUTPUT_CHARS:
            raise InvalidRequest(f"the model's chat template makes more than {MAX_OUTPUT_CHARS} characters")

    def check_time(self) -> None:
        """Raises InvalidRequest past the limit."""
        if time.monotonic() > self._deadline_s:
            raise InvalidRequest(f"the model's chat template ran longer than {MAX_RENDER_S:g} s: it was stopped")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the sizes of what a template builds held down."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.filters["indent"] = _indent
        for name in _GROWING_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No private attributes, nothing that changes its object, no method that makes text of any length."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _GROWING_METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is not offered: its widths know no limit."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute or item; a text that has grown past the limit in a namespace ends the rendering."""
        found = super().getattr(obj, attribute)
        if isinstance(found, str | list):
            _check_size(len(found))
        return found

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse the sums and products whose result would be huge, before they are made."""
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise InvalidRequest(f"the model's chat template formats text by {left!r:.40}: such widths are not offered")
        if operator == "**":
            _check_size(abs(int(right)) * max(abs(int(left)).bit_length(), 1))
        elif operator == "*" and isinstance(right, str | list | tuple):
            _check_size(len(right) * int(left))
        elif operator == "*" and isinstance(left, str | list | tuple):
            _check_size(len(left) * int(right))
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, not escaped for HTML as Jinja's own filter does."""
    _check_indent(indent or 0)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Characters of private use stay: `escape.py` marks text with them.
    return re.sub(r"[^\x00-\x7f\U000f0000-\U0010ffff]", _json_escape, text) if ensure_ascii else text


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter, for widths that text can have."""
    _check_indent(width if isinstance(width, int) else len(width))
    return jinja2.filters.do_indent(text, width, first, blank)


def _check_indent(width: int) -> None:
    if width > _MAX_INDENT:
        raise InvalidRequest(f"the model's chat template indents by {width}. Expected at most {_MAX_INDENT}.")


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise InvalidRequest(
            f"the model's chat template builds a value of {size:.3g}. The limit is {MAX_OUTPUT_CHARS}."
        )


def _raise_exception(message: str) -> NoReturn:
    """What templates call when the messages are not as they want them."""
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Today, for templates that tell the model the date."""
    return datetime.datetime.now().strftime(pattern)


def _shown(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
