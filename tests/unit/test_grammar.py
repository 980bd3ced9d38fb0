"""Matchers over a vocabulary of bytes: what they allow, when they are done, and what a hostile grammar can do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest
from tests.needs import needs

from hob.api.grammars import grammar_of, of_schema
from hob.api.schema import CompletionRequest
from hob.engine.grammar import BACKGROUND_NICE, LIMITS, Grammars, Masks, Matcher, mask_bytes
from hob.errors import InvalidRequest
from hob.request import MAX_GRAMMAR_BYTES, Grammar, ServiceClass

needs("llguidance")

WORDS = [b"true", b'"name": ', b"\xe2\x82", b"\xac"]
TOKENS = [bytes([i]) for i in range(256)] + WORDS + [b""]
STOP = len(TOKENS) - 1


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENS, [STOP])


def grammar(**fields: object) -> Grammar:
    found = grammar_of(CompletionRequest(model="", prompt="", **fields))  # type: ignore[arg-type]
    assert found is not None
    return found


def matcher(grammars: Grammars, made: Grammar) -> Matcher:
    return grammars.compile(made).result()


def allowed(one: Matcher) -> set[bytes]:
    row = np.zeros(mask_bytes(len(TOKENS)), np.uint8)
    assert one.fill(row) is None
    ids = np.unpackbits(row, count=len(TOKENS), bitorder="little").nonzero()[0]
    return {TOKENS[i] or b"<stop>" for i in ids}


def feed(one: Matcher, text: str) -> bool:
    """Byte by byte; whether it is complete at the end and not before."""
    raw = text.encode()
    ends = [one.accept(byte) for byte in raw]
    assert not any(ends[:-1])
    return ends[-1]


def fits(one: Matcher, text: str) -> bool:
    """Whether all of it may be drawn, byte by byte, and be the end."""
    for byte in text.encode():
        if bytes([byte]) not in allowed(one):
            return False
        one.accept(byte)
    return b"<stop>" in allowed(one)


def test_only_what_fits_may_follow(grammars: Grammars) -> None:
    one = matcher(grammars, of_schema({"type": "object", "properties": {"name": {"type": "boolean"}}}, "s"))
    assert allowed(one) == {b"{"}
    assert not one.accept(ord("{"))
    assert {b'"', b'"name": ', b"}"} == allowed(one)
    assert not one.accept(257)
    assert {b"t", b"f", b"true"} == allowed(one)


def test_any_split_of_the_bytes_may_be_drawn(grammars: Grammars) -> None:
    one = matcher(grammars, grammar(choice=["€"]))
    assert allowed(one) == {b"\xe2", b"\xe2\x82"}
    assert not one.accept(258)
    assert one.accept(259)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"choice": ['a "quoted" / one', "b"]}, 'a "quoted" / one'),
        ({"regex": r"\d\d/\w\n[^\d]"}, "12/a\nx"),
        ({"regex": "^a\nb\\/c$"}, "a\nb/c"),
        ({"grammar": 'start: "(" start ")" | "x"'}, "((x))"),
        ({"response_format": {"type": "json_object"}}, '{"a": [1, {"b": null}]}'),
    ],
)
def test_each_way_to_ask(grammars: Grammars, fields: dict[str, object], text: str) -> None:
    one = matcher(grammars, grammar(**fields))
    twin = one.fork()
    assert feed(one, text)
    assert feed(twin, text)


def test_stops_where_it_may(grammars: Grammars) -> None:
    one = matcher(grammars, grammar(regex="[0-9]+"))
    assert b"<stop>" not in allowed(one)
    assert not one.accept(ord("7"))
    assert b"<stop>" in allowed(one)
    assert one.accept(STOP)


def test_digits_of_a_regex_are_ascii(grammars: Grammars) -> None:
    assert allowed(matcher(grammars, grammar(regex=r"\d[\w.]"))) == {bytes([c]) for c in b"0123456789"}


@pytest.mark.parametrize(
    "lark",
    [
        "start: /(?=a)b/",
        'start: "a',
        'begin: "a"',
        'start: %json {"not": {}}',
        'start: %json {"type": "string", "format": "no-such-format"}',
        'start: %json {"$ref": "https://example.com/schema.json"}',
        'start: %json {"$ref": "#"}',
        "start: /[a&&b]/",
        'start: %json {"const": -9223372036854775808}',
        'start: %json {"enum": ["a", -9223372036854775807]}',
        'start: %json {"type": "integer", "minimum": -9223372036854775807,"maximum":-9223372036854775800}',
        'start: %json {"type": "integer", "const": -1e19}',
        'start: %json {"type": "integer", "enum": [1,-93.0E+17]}',
        'start: %json {"allOf": [{"type": "integer", "minimum": -1e308}, {"maximum": -1e308}]}',
    ],
)
def test_what_cannot_be_enforced_is_refused(grammars: Grammars, lark: str) -> None:
    with pytest.raises(InvalidRequest, match="field 'grammar' cannot be enforced") as caught:
        matcher(grammars, Grammar(lark, "grammar"))
    assert caught.value.param == "grammar"


def test_large_integers_may_be_asked_for(grammars: Grammars) -> None:
    assert feed(matcher(grammars, Grammar('start: %json {"const": -99999999999999}', "s")), "-99999999999999")
    digits = '"-9223372036854775808"'
    assert feed(matcher(grammars, Grammar(f'start: %json {{"const": {digits}}}', "s")), digits)


WHOLE = {"type": "integer"}
TAKEN_FOR_OTHERS = [
    {"const": 2**53 + 1},
    {"const": 10**400},
    {"enum": ["a", {"b": [123456789012345678]}]},
    {"type": "object", "properties": {"id": WHOLE | {"minimum": 999999999999999999}}},
    {"items": WHOLE | {"exclusiveMaximum": 2**64 - 1}},
    {"anyOf": [WHOLE | {"minimum": -999999999999999999}, {"type": "null"}]},
]


@pytest.mark.parametrize("schema", TAKEN_FOR_OTHERS)
def test_integers_that_would_be_taken_for_others_are_refused(schema: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"field 's' cannot be enforced: it holds -?\d+, which would be") as caught:
        of_schema(schema, "s")
    assert caught.value.param == "s"
    with pytest.raises(InvalidRequest, match="field 'grammar' cannot be enforced"):
        grammar(grammar="start: %json " + msgspec.json.encode(schema).decode())


def test_the_control_of_those_is_taken_for_another(grammars: Grammars) -> None:
    lark = 'start: %json {"const": 9007199254740993}'
    assert feed(matcher(grammars, Grammar(lark, "s")), "9007199254740992"), "`_check_exact` is no longer needed"


@pytest.mark.parametrize(
    ("schema", "least", "most"),
    [
        (WHOLE | {"minimum": 2**53 - 1, "maximum": 2**53}, 2**53 - 1, 2**53),
        (WHOLE | {"minimum": 2**63 - 2048, "maximum": 2**63 - 1}, 2**63 - 2048, 2**63 - 1),
        (WHOLE | {"minimum": -(10**18), "maximum": -(10**18) + 1024}, -(10**18), -(10**18) + 1024),
    ],
)
def test_bounds_that_are_held_exactly_are_kept_to_the_last_digit(
    grammars: Grammars, schema: dict[str, object], least: int, most: int
) -> None:
    one = matcher(grammars, of_schema(schema | {"examples": [2**53 + 1], "default": 2**64 - 1}, "s"))
    assert [fits(one.fork(), str(n)) for n in (least - 1, least, most, most + 1)] == [False, True, True, False]


@pytest.mark.parametrize("schema", ['{"const": -9223372036854775808}', '{"type": "integer", "const": -1e19}'])
def test_an_integer_near_the_least_ends_a_process_on_any_stack(schema: str) -> None:
    """The control of those above: what llguidance does with it."""
    script = (
        "import llguidance as g, sys\n"
        "m = g.LLMatcher(g.LLTokenizer('byte'), sys.argv[1], log_level=0)\n"
        "print('survived', m.is_error())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, f"start: %json {schema}"], capture_output=True, text=True)
    assert done.returncode < 0, f"{done.stdout}: llguidance no longer needs `LEAST` in engine/grammar.py"


def test_options_that_would_loosen_it_do_not(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match="x-guidance"):
        of_schema({"not": {}, "x-guidance": {"lenient": True}}, "s")
    one = matcher(grammars, Grammar('%llguidance {"no_forcing": false}\nstart: "true"', "grammar"))
    assert allowed(one) == {b"t", b"true"}


DEEP = 60_000
CHAIN = 7_000
HOSTILE = {
    "parentheses": "start: " + "(" * DEEP + '"a"' + ")" * DEEP,
    "brackets": "start: " + "[" * DEEP + '"a"' + "]" * DEEP,
    "regex": "start: /" + "(" * DEEP + "a" + ")" * DEEP + "/",
    "schema": "start: %json " + '{"items":' * DEEP + "{}" + "}" * DEEP,
    "rules": "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(DEEP)) + f'r{DEEP}:"a"',
    "references": 'start: %json {"$defs":{'
    + "".join(f'"{i}":{{"$ref":"#/$defs/{i + 1}"}},' for i in range(DEEP))
    + f'"{DEEP}":{{"type":"null"}}}},"$ref":"#/$defs/0"}}',
}


@pytest.mark.parametrize("lark", HOSTILE.values(), ids=HOSTILE)
def test_sixty_thousand_levels_are_an_error(grammars: Grammars, lark: str) -> None:
    with pytest.raises(InvalidRequest, match="bytes"):
        matcher(grammars, Grammar(lark, "grammar"))


LONGEST = {
    "parentheses": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "regex": "start: /" + "(" * 30_000 + "a" + ")" * 30_000 + "/",
    "schema": "start: %json " + '{"items":' * 6_000 + "{}" + "}" * 6_000,
    "rules": "start:a0\n" + "".join(f"a{i:x}:a{i + 1:x}\n" for i in range(5_500)) + f'a{5_500:x}:"a"',
    "terminals": "start:A0\n" + "".join(f"A{i}:A{i + 1}\n" for i in range(4_800)) + 'A4800:"a"',
    "references": 'start: %json {"$defs":{'
    + "".join(f'"{i}":{{"$ref":"#/$defs/{i + 1}"}},' for i in range(2_100))
    + '"2100":{"type":"null"}},"$ref":"#/$defs/0"}',
    "optional": "start: /" + "(a?){500}" * 7_000 + "/",
    "repeated": "start: " + '("a"{0,9999}){0,9999} ' * 2_000,
}


@pytest.mark.parametrize("lark", LONGEST.values(), ids=LONGEST)
def test_the_longest_that_may_be_asked_leaves_the_process_whole(grammars: Grammars, lark: str) -> None:
    assert len(lark) < MAX_GRAMMAR_BYTES
    made = grammars.compile(Grammar(lark, "grammar"))
    error = made.exception(60)
    assert error is None or isinstance(error, InvalidRequest)
    if error is None:
        masks = Masks(len(TOKENS))
        masks.begin([made.result()], [[]]).result(60)
        masks.accept([made.result()], [[ord("a")]])


def test_a_background_jobs_grammar_holds_up_its_own_class_alone() -> None:
    grammars, is_over = Grammars(TOKENS, [STOP]), threading.Event()
    one = Grammar('start: "a"', "grammar")
    grammars.compile(one, ServiceClass.BACKGROUND).result()
    grammars._compilers[ServiceClass.BACKGROUND].submit(is_over.wait)  # a grammar that takes its time
    late = grammars.compile(one, ServiceClass.BACKGROUND)
    for urgent in (ServiceClass.INTERACTIVE, ServiceClass.STANDARD):
        assert fits(grammars.compile(one, urgent).result(60), "a")
    assert not late.done(), "the control"
    is_over.set()
    assert fits(late.result(60), "a")


def test_background_grammars_are_compiled_at_a_lower_priority() -> None:
    grammars = Grammars(TOKENS, [STOP])
    nice = {}
    for each in (ServiceClass.STANDARD, ServiceClass.BACKGROUND):
        grammars.compile(Grammar('start: "a"', "grammar"), each).result()
        own = grammars._compilers[each].submit(threading.get_native_id).result()
        nice[each] = os.getpriority(os.PRIO_PROCESS, own)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice == {ServiceClass.STANDARD: ours, ServiceClass.BACKGROUND: min(ours + BACKGROUND_NICE, 19)}


DEEP_TEXTS = {
    "rules": LONGEST["rules"],
    "terminals": LONGEST["terminals"],
    "nested rules": "start:a0\n" + "".join(f'a{i}:"a" a{i + 1} "b"|"c"\n' for i in range(2_400)) + 'a2400:"a"',
    "nested terminals": "start:A0\n" + "".join(f'A{i}:"a" A{i + 1} "b"|"c"\n' for i in range(2_400)) + 'A2400:"a"',
    "a rule in itself": 'start: "a" start "b" | "c"',
}


@pytest.mark.parametrize("lark", DEEP_TEXTS.values(), ids=DEEP_TEXTS)
def test_taking_in_tokens_needs_no_deep_stack(grammars: Grammars, lark: str) -> None:
    """`Masks.accept` runs in the engine's thread, which has 8 MB: here in one of 128 KB, for as long as it goes on."""
    one, masks, ends = matcher(grammars, Grammar(lark, "grammar")), Masks(len(TOKENS)), [None]

    def accept(token_id: int) -> None:
        ends[:] = masks.accept([one], [[token_id]])  # type: ignore[assignment]

    before = threading.stack_size(128 << 10)
    try:
        for _ in range(150):
            row = masks.begin([one], [[]]).result()[0]
            ids = np.unpackbits(row, count=STOP, bitorder="little").nonzero()[0]
            thread = threading.Thread(target=accept, args=(int(ids[0]),))
            thread.start()
            thread.join()
            if ends[0] is not None:
                break
    finally:
        threading.stack_size(before)


def test_such_a_chain_ends_a_process_with_an_ordinary_stack() -> None:
    """The control of the test above: without the deep stack it would have failed."""
    script = (
        "import llguidance as g, sys\n"
        "t = g.LLTokenizer('byte')\n"
        "m = g.LLMatcher(t, sys.stdin.read(), log_level=0)\n"
        "print('survived', m.is_error())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=LONGEST["rules"], capture_output=True, text=True)
    assert done.returncode < 0, done.stdout


def test_a_grammar_that_grows_too_costly_ends_its_own_sequence(grammars: Grammars) -> None:
    costly = matcher(grammars, Grammar('start: s\ns: s s s | s s | "a"', "grammar"))
    modest = matcher(grammars, grammar(regex="a+"))
    masks = Masks(len(TOKENS))
    for _ in range(2 * LIMITS["max_items_in_row"]):
        rows = masks.begin([costly, None, modest], [[]] * 3).result()
        assert rows.any(axis=1).all()
        assert (rows[1] == 0xFF).all()
        ended = masks.accept([costly, None, modest], [[ord("a")]] * 3)
        assert ended[1] is None
        assert ended[2] is None
        if ended[0] is not None:
            assert ended[0].error is not None
            assert "cannot be enforced" in ended[0].error.message
            return
    pytest.fail("it never ended")


def test_the_library_waits_for_the_first_grammar() -> None:
    script = "import sys, hob.service.loop; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "False", done.stderr
