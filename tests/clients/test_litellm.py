"""litellm, unchanged, by both of our APIs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.heavy import heavy

pytestmark = pytest.mark.filterwarnings("ignore")

ASK = [{"role": "user", "content": "Hi"}]
FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "lamp",
        "schema": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def litellm() -> Any:
    return heavy("litellm")


@pytest.fixture(params=["openai/fake", "ollama_chat/fake"])
def options(request: pytest.FixtureRequest, url: str) -> dict[str, Any]:
    base = url + "/v1" if request.param.startswith("openai") else url
    return {"model": request.param, "api_base": base, "api_key": "any", "messages": ASK, "max_retries": 0}


def test_whole_and_streamed(litellm: Any, options: dict[str, Any]) -> None:
    reply = litellm.completion(**options, max_tokens=12, seed=3)
    assert reply.usage.completion_tokens == 12
    chunks = litellm.completion(**options, max_tokens=12, seed=3, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == reply.choices[0].message.content.strip()


def test_structured_output(litellm: Any, options: dict[str, Any]) -> None:
    reply = litellm.completion(**options, max_tokens=200, response_format=FORMAT)
    assert set(json.loads(reply.choices[0].message.content)) == {"on"}
