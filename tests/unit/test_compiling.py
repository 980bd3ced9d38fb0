"""Requests whose grammar is being compiled."""

from __future__ import annotations

import threading

import pytest
from tests.needs import needs

from hob.errors import Overloaded
from hob.messages import Vocabulary
from hob.request import Grammar, Request, ServiceClass
from hob.service.compiling import MAX_PENDING, Compiling

needs("llguidance")


def request(name: str, lark: str = 'start: "a"') -> Request:
    return Request(name, "app", [1], service_class=ServiceClass.BACKGROUND, grammar=Grammar(lark, "grammar"))


def compiling() -> Compiling:
    made = Compiling()
    made.learn(Vocabulary("", [bytes([i]) for i in range(256)], [0]))
    return made


def test_nobody_waits_for_a_grammar_but_who_has_nothing_else_to_do() -> None:
    one, is_over = compiling(), threading.Event()
    one.begin(request("first"))
    assert [done.request.request_id for done in one.ready(60.0)] == ["first"]
    assert one._grammars is not None
    one._grammars._compilers[ServiceClass.BACKGROUND].submit(is_over.wait)  # a grammar that takes its time
    for i in range(200):
        one.begin(request(f"r{i}"))
    assert one.ready(0.0) == one.ready(0.001) == []
    one.cancel("r0")
    is_over.set()
    names = []
    while one.is_busy:
        names += [done.request.request_id for done in one.ready(60.0)]
    assert names == [f"r{i}" for i in range(1, 200)]


def test_what_waits_is_bounded() -> None:
    one, is_over = compiling(), threading.Event()
    one.begin(request("first"))
    assert one._grammars is not None
    one._grammars._compilers[ServiceClass.BACKGROUND].submit(is_over.wait)
    one.ready(60.0)
    for i in range(MAX_PENDING):
        one.begin(request(f"r{i}"))
    with pytest.raises(Overloaded, match="1024 grammars wait"):
        one.begin(request("more"))
    for i in range(MAX_PENDING):
        one.cancel(f"r{i}")
    is_over.set()
    assert not one.is_busy


def test_what_cannot_be_compiled_comes_back_with_the_reason() -> None:
    one = compiling()
    one.begin(request("bad", "no grammar"))
    [bad] = one.ready(60.0)
    assert (bad.matchers, bad.error is not None) == ([], True)
