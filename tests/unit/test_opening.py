"""What loading models leaves behind in the engine process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from hob.service.opening import settle


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_frozen_is_collected_by_the_next_load_once_nobody_has_it() -> None:
    model = Node()
    gone = weakref.ref(model)
    settle()
    del model
    gc.collect()
    assert gone() is not None, "a cycle that is frozen is out of the collector's sight"
    settle()
    assert gone() is None
