"""A part of what `python -m tests.model.structured` does in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from hob.client import Client
from tests.daemons import running
from tests.needs import needs

needs("llguidance")
needs("jsonschema")
from tests.model.structured import SCHEMAS, TIMEOUT_S, fault_of, generate_all  # noqa: E402

pytestmark = [pytest.mark.weights, pytest.mark.slow]


def test_sixty_generations_over_fifty_schemas_are_valid(default_gguf: Path) -> None:
    assert len(SCHEMAS) == 50
    with running(model=default_gguf) as daemon, Client(daemon.rundir.socket_path, timeout_s=TIMEOUT_S) as client:
        made = generate_all(client, 60)
    assert [one for one in made if one.fault or one.finish != "stop"] == []


def test_the_check_sees_what_is_wrong() -> None:
    """The control: texts that are no JSON, too little, too much, of the wrong type or format."""
    schema = SCHEMAS[0]["schema"]
    good = '{"name": "Ada", "age": 36, "email": "ada@example.org"}'
    assert fault_of(good, schema) == ""
    for bad in (good[:-1], good.replace("36", '"36"'), good.replace("36", "360"), good.replace("@", ""), "{}"):
        assert fault_of(bad, schema)
