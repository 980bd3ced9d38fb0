"""The document of the API: whether all of it is in there."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import jsonschema
from starlette.routing import Route

from hob.api import page
from hob.api.app import create_router
from hob.api.openapi import document
from hob.api.services import Services


def test_every_route_is_in_the_document_and_no_other() -> None:
    routes: set[tuple[str, str]] = set()
    for route in create_router(cast(Services, None)).routes:
        assert isinstance(route, Route)
        path = re.sub(r"{(\w+):path}", r"{\1}", route.path)
        if path not in page.FILES and not path.startswith(page.ENTER):  # for browsers, no part of the API
            routes |= {(method.lower(), path) for method in route.methods or () if method != "HEAD"}
    said = {(method, path) for path, methods in document()["paths"].items() for method in methods}
    assert said == routes


def test_fields_that_are_not_done_are_said_to_have_few_values() -> None:
    fields = document()["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["store"]["enum"] == [None, False]
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in fields["temperature"]["anyOf"]


def test_an_ordinary_request_fits_the_document() -> None:
    schema: dict[str, Any] = {**document(), "$ref": "#/components/schemas/ChatRequest"}
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "stop": ["x"]}
    jsonschema.validate(json.loads(json.dumps(body)), schema)
