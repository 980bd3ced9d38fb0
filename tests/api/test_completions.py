"""Legacy completions: every form of prompt, echo with exact log-probabilities, streams."""

from __future__ import annotations

import openai
import pytest

from hob.request import Kind
from tests.api.conftest import wait_for
from tests.api.scripted import ScriptedBackend, score_of, tokens_of

MODEL = "scripted"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_forms_of_prompt(
    client: openai.OpenAI, backend: ScriptedBackend, prompt: str | list[str], expected: list[str]
) -> None:
    backend.script = lambda request, index: [*request.token_ids, 33 + index]
    reply = client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [choice.text for choice in reply.choices] == [e + mark for e in expected for mark in '!"']
    assert [choice.index for choice in reply.choices] == list(range(2 * len(expected)))
    assert reply.usage.prompt_tokens == sum(map(len, expected))
    assert reply.usage.completion_tokens == 2 * sum(len(e) + 1 for e in expected)
    assert {request.sampling.max_tokens for request in backend.requests} == {16}


def test_echo_without_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="Say: ", echo=True)
    assert reply.choices[0].text == "Say: Hello world"
    assert reply.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_is_the_likelihood_of_the_prompt(
    client: openai.OpenAI, backend: ScriptedBackend, stream: bool
) -> None:
    reply = client.completions.create(model=MODEL, prompt="a€b", echo=True, logprobs=2, max_tokens=1, stream=stream)
    chunks = list(reply) if stream else [reply]
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    ids = list("a€b".encode())
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a€bHello"
    assert [x for f in found for x in f.tokens] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b", "Hello"]
    logprobs = [x for f in found for x in f.token_logprobs]
    assert logprobs == [None, *map(score_of, ids[1:]), score_of(257)]
    assert [x for f in found for x in f.text_offset] == [0, 1, 1, 1, 2, 3]
    tops = [x for f in found for x in f.top_logprobs]
    assert tops[0] is None
    assert tops[4] == {"a": -0.25, "b": -0.5}
    assert tops[5] == {"a": -0.25, "b": -0.5, "Hello": score_of(257)}
    assert [request.kind for request in backend.requests] == [Kind.SCORE, Kind.GENERATE]


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_a_reply_is_among_its_logprobs(
    client: openai.OpenAI, backend: ScriptedBackend, stream: bool
) -> None:
    """lm-eval asks for one token after an echo and takes all but the last log-probability for the echo's."""
    backend.script = lambda request, index: []
    reply = client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=2, max_tokens=1, stream=stream)
    chunks = list(reply) if stream else [reply]
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert [x for f in found for x in f.tokens] == ["a", "b", "<stop>"]
    assert [x for f in found for x in f.token_logprobs] == [None, score_of(98), score_of(256)]
    assert [x for f in found for x in f.text_offset] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_scores_only(client: openai.OpenAI, backend: ScriptedBackend, stream: bool) -> None:
    reply = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=0, max_tokens=0, stream=stream)
    choice = (next(iter(reply)) if stream else reply).choices[0]
    assert choice.text == "abc"
    assert choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs == [None, score_of(98), score_of(99)]
    assert choice.logprobs.top_logprobs == [None, {"b": score_of(98)}, {"c": score_of(99)}]
    assert [request.kind for request in backend.requests] == [Kind.SCORE]
    if not stream:
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 0)


def test_prompt_of_one_token_has_no_likelihood(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    reply = client.completions.create(model=MODEL, prompt="a", echo=True, logprobs=1, max_tokens=0)
    assert reply.choices[0].logprobs.token_logprobs == [None]
    assert reply.usage.prompt_tokens == 1
    assert backend.requests == []


def test_stream_of_many_prompts(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    prompts = [chr(97 + i) for i in range(26)] * 2
    backend.script = lambda request, index: [request.token_ids[0], 33]
    texts = [""] * len(prompts)
    reasons = [""] * len(prompts)
    stream = client.completions.create(model=MODEL, prompt=prompts, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        reasons[chunk.choices[0].index] += chunk.choices[0].finish_reason or ""
    assert texts == [prompt + "!" for prompt in prompts]
    assert set(reasons) == {"stop"}
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompts), 2 * len(prompts))


def test_leaving_cancels_every_prompt(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.delay_s = 0.02
    backend.script = lambda request, index: tokens_of(" more" * 16)
    stream = client.completions.create(model=MODEL, prompt=["a", "b", "c"], stream=True)
    next(iter(stream))
    wait_for(lambda: backend.num_open == 3)
    stream.close()
    wait_for(lambda: backend.num_open == 0, timeout_s=0.5)
    assert backend.num_cancelled == 3


@pytest.mark.parametrize("stream", [False, True])
def test_one_failure_ends_all(client: openai.OpenAI, backend: ScriptedBackend, stream: bool) -> None:
    backend.fail_after = 1
    with pytest.raises(openai.APIError, match="the engine process died"):
        list(client.completions.create(model=MODEL, prompt=["a", "b", "c"], stream=stream))
    wait_for(lambda: backend.num_open == 0, timeout_s=0.5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [97, "a"]}, "prompt[1]"),
        ({"prompt": [97, 5000]}, "prompt[1]"),
        ({"prompt": [97, True]}, "prompt[1]"),
        ({"prompt": [[97], []]}, "prompt[1]"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 512}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a" * 512}, "prompt"),
    ],
)
def test_refused(client: openai.OpenAI, backend: ScriptedBackend, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, **fields)
    assert caught.value.param == param
    assert backend.requests == []
