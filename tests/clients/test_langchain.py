"""langchain-openai, unchanged: chat, streams, structured output, tools, embeddings."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.needs import needs

pytestmark = pytest.mark.filterwarnings("ignore")


class Lamp(BaseModel):
    """A lamp to be set. Nothing else may be said: the fake engine would never come to an end."""

    model_config = ConfigDict(extra="forbid")
    room: Literal["kitchen", "bath"]
    level: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def made(url: str) -> Any:
    needs("langchain_openai")
    import langchain_openai

    return langchain_openai


def chat(made: Any, url: str, **fields: Any) -> Any:
    return made.ChatOpenAI(model="fake", base_url=url + "/v1", api_key="any", max_retries=0, **fields)


def test_invoke_and_stream(made: Any, url: str) -> None:
    reply = chat(made, url, max_tokens=12, seed=3).invoke("Hi")
    assert reply.usage_metadata["output_tokens"] == 12
    chunks = list(chat(made, url, max_tokens=12, seed=3).stream("Hi"))
    assert "".join(chunk.content for chunk in chunks) == reply.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(made: Any, url: str, method: str) -> None:
    lamp = chat(made, url, max_tokens=300).with_structured_output(Lamp, method=method).invoke("Light in the bath.")
    assert isinstance(lamp, Lamp)


def test_tools(made: Any, url: str) -> None:
    model = chat(made, url, max_tokens=300).bind_tools([Lamp], tool_choice="required", parallel_tool_calls=False)
    (call,) = model.invoke("Light in the bath.").tool_calls
    assert call["name"] == "Lamp"
    assert Lamp(**call["args"])


def test_embeddings(made: Any, url: str) -> None:
    client = made.OpenAIEmbeddings(
        model="fake", base_url=url + "/v1", api_key="any", check_embedding_ctx_length=False, max_retries=0
    )
    assert len(client.embed_documents(["a", "b"])) == 2
