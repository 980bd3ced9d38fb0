"""Render a chat template: Jinja2 as Hugging Face sets it up, in a sandbox, with limits.

Templates are programs out of model files. The sandbox keeps them from Python's insides and from changing what they
are given; the limits keep them from filling the memory or looping for ever: characters put out, the size of any value
they build and of all together, numbers a `range` may count over all its uses, and seconds. Whatever joins texts is told
the size before it does (`_grow`), and whatever repeats looks at the clock: operators, filters, methods, macros and
captured blocks by the hooks that Jinja has, `~` and `for` by a change to the parsed template. It knows no tokens.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hob.errors import InvalidRequest

MAX_OUTPUT_CHARS = 16 << 20
MAX_BUILT_CHARS = 16 * MAX_OUTPUT_CHARS
"""Of all texts and lists that one rendering builds on its way."""
MAX_INT_BITS = 1 << 20
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

_GROWING_METHODS = {
    *("center", "encode", "expandtabs", "format", "format_map", "from_bytes", "ljust", "rjust", "to_bytes", "zfill")
}
"""Methods that make a value of any length out of a number, and the way to bytes, which have more of them."""
_GROWING_FILTERS = ("batch", "center", "format", "pprint", "slice", "urlize", "wordwrap")
_COMPARING_FILTERS = ("dictsort", "groupby", "max", "min", "sort", "unique")
"""Compare long texts many times: what they get is to be as short as what may be put out."""
_ITEM_CHARS = 16
"""What an item of a list counts as."""
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)")
_MAX_INDENT = 64


class ChatTemplate:
    """One compiled template. Raises InvalidRequest if it does not parse."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _compiled(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, MemoryError) as error:
            raise InvalidRequest(
                f"the model's chat template does not parse: {_shown(error)}. "
                "Use /v1/completions with your own prompt, or another model."
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises InvalidRequest with the template's own words, or naming the limit."""
        meter = _Meter()
        outer = _METER.set(meter)
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
        finally:
            _METER.reset(outer)
        return "".join(parts)


@lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    """Models come and go, their templates stay the same: compiled anew each time they left holes in the heap, 2 MB in
    2,400 loads."""
    return _Environment().from_string(source)


class _Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self._deadline_s = time.monotonic() + MAX_RENDER_S
        self._num_counted = 0
        self._num_built = 0

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

    def build(self, size: int) -> None:
        """Charge a value that is about to be made."""
        self._num_built += size
        if self._num_built > MAX_BUILT_CHARS:
            raise InvalidRequest(f"the model's chat template builds more than {MAX_BUILT_CHARS} characters on its way")
        self.check_time()

    def check_time(self) -> None:
        """Raises InvalidRequest past the limit."""
        if time.monotonic() > self._deadline_s:
            raise InvalidRequest(f"the model's chat template ran longer than {MAX_RENDER_S:g} s: it was stopped")


_METER: ContextVar[_Meter | None] = ContextVar("meter", default=None)
"""Of the rendering that runs. None while a template is compiled, which computes what is constant in it."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the sizes of what a template builds held down."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_check_printed,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.concat = _concat  # type: ignore[method-assign]  # a plain attribute of Jinja's class
        for name in _GROWING_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": _to_json, "indent": _indent, "join": _join, "replace": _replace, "round": _round}
        self.filters |= {"string": _string, "sum": _sum}
        for name in _COMPARING_FILTERS:
            self.filters[name] = _comparing(self.filters[name])
        for name, made in list(self.filters.items()):
            self.filters[name] = _charged(made)
        self.filters |= {"_each": _each, "_glue": _glue}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """With each `a ~ b` and each `for` going through a filter of ours."""
        template = super()._parse(source, name, filename)
        _meter_nodes(template)
        return template

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call out of a template; methods of texts that join are ours."""
        owner, method = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and method in _METHODS:
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # not Jinja's own
            return _METHODS[method](owner, *args, **given)
        return _charge(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No private attributes, nothing that changes its object, no method that makes a value of any length."""
        return super().is_safe_attribute(obj, attr, value) and attr not in _GROWING_METHODS

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
        if operator == "%" and isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise InvalidRequest(
                    f"the model's chat template formats text by {left!r:.40}: such widths are not offered"
                )
            _grow(len(left) + left.count("%") * _printed_size(right))
        elif operator == "**":
            _check_bits(abs(int(right)) * max(abs(int(left)).bit_length(), 1))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*" and isinstance(right, str | list | tuple):
            _grow(_length(right) * int(left))
        elif operator == "*" and isinstance(left, str | list | tuple):
            _grow(_length(left) * int(right))
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _grow(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


def _meter_nodes(node: nodes.Node) -> None:
    """Put the filters `_glue` and `_each` in, from the inside out."""
    for field, value in node.iter_fields():
        items = value if isinstance(value, list) else [value]
        for i, child in enumerate(items):
            if not isinstance(child, nodes.Node):
                continue
            _meter_nodes(child)
            if isinstance(child, nodes.Concat):
                parts = nodes.List(child.nodes, lineno=child.lineno)
                child = nodes.Filter(parts, "_glue", [], [], None, None, lineno=child.lineno)
                if isinstance(value, list):
                    value[i] = child
                else:
                    setattr(node, field, child)
    if isinstance(node, nodes.For):
        node.iter = nodes.Filter(node.iter, "_each", [], [], None, None, lineno=node.lineno)


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, looking at the clock now and then."""
    meter = _METER.get()
    for i, item in enumerate(items):
        if meter is not None and i % 256 == 255:
            meter.check_time()
        yield item


class _Each:
    """A long list that a `for` goes over, of which it may ask the length."""

    def __init__(self, items: Collection[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return _ticking(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _each(items: Any) -> Any:
    if (meter := _METER.get()) is not None:
        meter.check_time()  # of loops in loops that go over little
    if isinstance(items, Iterator):
        return _ticking(items)
    return _Each(items) if isinstance(items, Collection) and len(items) >= 256 else items


def _grow(size: int) -> None:
    """Called before a value of so many characters is made."""
    _check_size(size)
    if (meter := _METER.get()) is not None:
        meter.build(size)


def _length(value: str | list[Any] | tuple[Any, ...]) -> int:
    return len(value) if isinstance(value, str) else _ITEM_CHARS * len(value)


def _charge(value: Any) -> Any:
    """Charge a value that was made from others of bounded size."""
    if isinstance(value, str | list | tuple):
        _grow(_length(value))
    is_lazy = isinstance(value, Iterator) and not isinstance(value, jinja2.runtime.LoopContext)
    return _ticking(value) if is_lazy else value


def _charged(made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is charged. `wraps` keeps what Jinja has marked it with."""

    @wraps(made)
    def charged(*args: Any, **kwargs: Any) -> Any:
        return _charge(made(*args, **kwargs))

    return charged


def _comparing(made: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(made)
    def comparing(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        value = value if isinstance(value, Mapping | str) else list(value)
        _check_printed(value)
        return made(environment, value, *args, **kwargs)

    @wraps(made)
    def dictsort(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_printed(value)
        return made(value, *args, **kwargs)

    return dictsort if made is jinja2.filters.do_dictsort else comparing


def _printed_size(value: Any, indent: int = 0, depth: int = 1) -> int:
    """About the characters of a value as text. Raises InvalidRequest as soon as that is past the limit."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 2
    if isinstance(value, jinja2.utils.Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if not isinstance(value, Collection) or isinstance(value, range):
        return 64
    size = 2
    items = value.items() if isinstance(value, Mapping) else value
    for item in items:
        size += _ITEM_CHARS + indent * depth + _printed_size(item, indent, depth + 1)
        if size > MAX_OUTPUT_CHARS:
            _check_size(size)
    return size


def _check_printed(value: Any) -> Any:
    """A value that is to be put out."""
    if not isinstance(value, str):
        _check_size(_printed_size(value))
    return value


def _concat(parts: Iterable[str]) -> str:
    """What a macro or a captured block has put out."""
    found, size = [], 0
    for part in parts:
        size += len(part)
        _check_size(size)
        found.append(part)
    _grow(size)
    return "".join(found)


def _glue(parts: list[Any]) -> str:
    """`a ~ b ~ ...`."""
    _grow(sum(map(_printed_size, parts)))
    return "".join(map(str, parts))


def _string(value: Any) -> str:
    return value if isinstance(value, str) else str(_check_printed(value))


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """Jinja's filter."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return _join_by(str(d), value)


def _join_by(separator: str, parts: Iterable[Any], /) -> str:
    """str's method."""
    parts = list(parts)
    _grow(len(separator) * len(parts) + sum(map(_printed_size, parts)))
    return separator.join(map(str, parts))


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    """Jinja's filter and str's method."""
    text, old, new = str(_check_printed(text)), str(_check_printed(old)), str(_check_printed(new))
    _grow(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


_METHODS: dict[str, Callable[..., str]] = {"join": _join_by, "replace": _replace}
"""Methods of texts that join or repeat others."""


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > _MAX_INDENT:
        raise InvalidRequest(f"the model's chat template rounds to {precision} digits. Expected at most {_MAX_INDENT}.")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _sum(values: Iterable[Any]) -> Any:
    return sum(values)


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
    _grow(_printed_size(value, indent or 0))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Characters of private use stay: `escape.py` marks text with them.
    return re.sub(r"[^\x00-\x7f\U000f0000-\U0010ffff]", _json_escape, text) if ensure_ascii else text


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter, for widths that text can have."""
    _check_indent(width if isinstance(width, int) else len(width))
    _grow(len(text) + (text.count("\n") + 1) * _MAX_INDENT)
    return jinja2.filters.do_indent(text, width, first, blank)


def _check_indent(width: int) -> None:
    if width > _MAX_INDENT:
        raise InvalidRequest(f"the model's chat template indents by {width}. Expected at most {_MAX_INDENT}.")


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise InvalidRequest(
            f"the model's chat template builds a value of {size:.3g}. The limit is {MAX_OUTPUT_CHARS}."
        )


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_INT_BITS:
        raise InvalidRequest(
            f"the model's chat template computes a number of {num_bits:.3g} bits. The limit is {MAX_INT_BITS}."
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
