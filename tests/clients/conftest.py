"""A daemon with the fake engine for clients that are run as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemons import Daemon, running


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake") as started:
        yield started


@pytest.fixture(scope="module")
def url(daemon: Daemon) -> str:
    """Where a client is pointed at, without /v1."""
    return f"http://127.0.0.1:{daemon.state.port}"
