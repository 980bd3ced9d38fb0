"""The API over a real daemon with its engine process (the fake engine): what a scripted backend cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.daemons import Daemon, running, until

ASK = [{"role": "user", "content": "Tell me about hobs, the small spirits of the hearth."}]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake:2") as started:
        yield started


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{daemon.state.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as made:
        yield made


def bytes_of(reply: openai.types.chat.ChatCompletion, index: int = 0) -> list[int]:
    """The fake engine's tokens are random bytes; their text alone would hide differences."""
    return [byte for entry in reply.choices[index].logprobs.content for byte in entry.bytes]


def test_same_seed_same_tokens(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[int]:
        reply = client.chat.completions.create(
            model="fake", messages=ASK, seed=seed, max_tokens=20, logprobs=True, top_logprobs=1
        )
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 20
        return bytes_of(reply)

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert len(ask(3)) == 20


def test_samples_differ_and_the_stream_says_the_same(client: openai.OpenAI) -> None:
    options = {"model": "fake", "messages": ASK, "seed": 5, "max_tokens": 12, "n": 3, "logprobs": True}
    whole = client.chat.completions.create(**options)
    expected = [bytes_of(whole, i) for i in range(3)]
    assert len({tuple(sample) for sample in expected}) == 3
    got: list[list[int]] = [[], [], []]
    for chunk in client.chat.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        if choice.logprobs:
            got[choice.index] += [byte for entry in choice.logprobs.content for byte in entry.bytes]
    assert got == expected


def test_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    prompt = "A hob lives behind the hearth and does the chores at night. " * 4
    usages = [client.completions.create(model="fake", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert usages[0].prompt_tokens_details.cached_tokens == 0
    # whole blocks, and never the last token: something must be computed to predict what follows
    assert usages[1].prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_labels_score_as_the_prompt_that_ends_in_them(daemon: Daemon, client: openai.OpenAI) -> None:
    """Classification over a shared prefix and the echo of the whole text are two ways to one number."""
    prompt, continuations = "The weather is", [" fine", " wet", " awful indeed"]
    with daemon.client() as hob:
        labels = hob.classify(None, prompt=prompt, continuations=continuations)["labels"]
    for entry in labels:
        text = prompt + entry["label"]
        reply = client.completions.create(model="fake", prompt=text, echo=True, logprobs=1, max_tokens=0)
        logprobs = reply.choices[0].logprobs
        assert "".join(logprobs.tokens) == text
        assert sum(logprobs.token_logprobs[len(prompt) :]) == pytest.approx(entry["logprob"])
    assert sum(entry["probability"] for entry in labels) == pytest.approx(1)


def test_embeddings(client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model="fake", input=["one hob", "two hobs", "one hob"])
    vectors = [entry.embedding for entry in reply.data]
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-6) for vector in vectors)
    assert vectors[0] == vectors[2] != vectors[1]


def test_leaving_frees_the_engine(daemon: Daemon, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="fake", messages=ASK, stream=True, n=4)
    next(iter(stream))
    with daemon.client() as hob:
        until(lambda: hob.stats()["stats"]["num_running"] == 4, "four running sequences")
        stream.close()
        until(lambda: hob.stats()["stats"]["num_running"] == 0, "none running", timeout_s=1.0)


def test_context_is_refused_with_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"90,000 tokens, but the context is") as caught:
        client.completions.create(model="fake", prompt="x" * 90_000)
    assert caught.value.code == "context_length_exceeded"


def test_what_was_cached_is_told_also_when_a_stop_string_ends_the_reply_early(client: openai.OpenAI) -> None:
    prompt = "x" * 100
    options = {"model": "fake", "prompt": prompt, "seed": 3, "max_tokens": 40}
    text = client.completions.create(**options).choices[0].text
    reply = client.completions.create(**options, stop=text[10])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 40
    assert reply.usage.prompt_tokens_details.cached_tokens == (reply.usage.prompt_tokens - 1) // 16 * 16


def test_an_adapter_is_named_with_the_model_and_shares_no_cache_with_it(client: openai.OpenAI) -> None:
    def ask(model: str) -> tuple[list[int], int, str]:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "The same long words for the base and for its adapter, " * 3}],
            temperature=0,
            max_tokens=8,
            logprobs=True,
            top_logprobs=1,
        )
        assert reply.model_extra["hob"]["model"]["adapter"] == (model.partition(":")[2] or None)
        return bytes_of(reply), reply.usage.prompt_tokens_details.cached_tokens, reply.model

    base, twin = ask("fake"), ask("fake:twin")
    assert base[0] != twin[0]
    assert (twin[1], twin[2]) == (0, "fake:twin")
    again, by_alias = ask("fake:twin"), ask("default:twin")
    assert again[0] == by_alias[0] == twin[0]
    assert again[1] > 0
    assert ask("fake")[0] == base[0]


def test_an_unknown_adapter_is_refused_with_those_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no adapter 'nobody'. It has: twin"):
        client.chat.completions.create(model="fake:nobody", messages=ASK)


def test_adapters_are_listed_beside_their_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][:2] == ["fake", "fake:twin"]
    assert client.models.retrieve("fake:twin").id == "fake:twin"


def test_guesses_change_no_reply_and_are_told() -> None:
    """With a grammar that leaves little to choose, most guesses are true; a stop string ends within a draft."""
    body = {"model": "fake", "prompt": "ab", "max_tokens": 120, "regex": "(abc|abd){30}e", "seed": 3, "logprobs": 2}
    replies = {}
    for speculation in ("auto", "off"):
        with running(model="fake:2", speculation=speculation) as started, started.client() as client:
            whole = client.complete(**body)
            stopped = client.complete(**body, stop=["cabcabcabcabca"])
            replies[speculation] = [
                (reply["choices"], reply["usage"]["completion_tokens"]) for reply in (whole, stopped)
            ]
            guessed = whole["hob"].get("guessed")
            if speculation == "off":
                assert guessed is None
            else:
                assert guessed["drafted"] >= guessed["accepted"] > 0  # how many depends on what steps take
    assert replies["auto"] == replies["off"]
    assert replies["auto"][1][1] < replies["auto"][0][1]
