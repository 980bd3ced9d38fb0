"""The three programs of the demo. Each is an operating-system process of its own that knows nothing but an address.

    python -m hob.demo.programs chat|labels|summaries --base-url URL --socket PATH

They say "ready" when their imports are done, start when a line comes on stdin, and report as JSON lines on stdout:

    {"event": "request", "ttft_s": 0.05, "tokens": 40, "seconds": 0.5, ...}    one answer
    {"event": "token", "text": "..."}    {"event": "lost", ...}    {"event": "done"}
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

LABELS_IN_FLIGHT = 4
SUMMARIES_IN_FLIGHT = 4
SUMMARY_TOKENS = 48
CHAT_TOKENS = 64
PATIENCE_S = 60.0
"""How long the chat waits for a daemon that went away."""

_lock = threading.Lock()


def emit(event: str, **fields: Any) -> None:
    """One JSON line for the demo to read."""
    with _lock:
        print(json.dumps({"event": event, **fields}), flush=True)


def load(name: str) -> Any:
    """A data file of the demo."""
    return json.loads((files("hob.demo") / "data" / f"{name}.json").read_text())


def chat(base_url: str, socket: str, turns: str) -> None:
    """A scripted conversation through the `openai` client over TCP: each question waits for the answer before.

    turns: 'turns', or 'after', which goes on with the conversation that comes as JSON instead of "go".
    """
    import openai

    headers = {"X-Hob-App": "chat", "X-Hob-Class": "interactive"}
    client = openai.OpenAI(base_url=base_url, api_key="any", default_headers=headers, max_retries=0)
    line = start_when_told()
    history: list[Any] = json.loads(line) if turns == "after" else []
    for question in load("chat")[turns]:
        ask(client, history, question)
    emit("done")


def ask(client: Any, history: list[Any], text: str) -> None:
    """One turn, streamed. If the daemon goes away in the middle, wait until it is back and ask again."""
    import openai

    history.append({"role": "user", "content": text})
    emit("question", text=text)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            history.append({"role": "assistant", "content": _stream(client, history)})
            return
        except (openai.APIError, OSError, IncompleteReply) as error:
            if time.monotonic() > deadline:
                raise
            emit("lost", error=f"{type(error).__name__}: {error}")
            time.sleep(0.25)


class IncompleteReply(Exception):
    """The stream ended without a finish reason."""


def _stream(client: Any, history: list[Any]) -> str:
    start = time.perf_counter()
    first, parts, finish, usage = 0.0, [], None, None
    stream = client.chat.completions.create(
        model="default",
        messages=history,
        max_tokens=CHAT_TOKENS,
        temperature=0.3,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"repetition_penalty": 1.1},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter()
                parts.append(choice.delta.content)
                emit("token", text=choice.delta.content)
            finish = choice.finish_reason or finish
    if finish is None or usage is None:
        raise IncompleteReply("the stream ended early")
    seconds = time.perf_counter() - start
    ttft_s = (first or time.perf_counter()) - start
    emit("request", ttft_s=ttft_s, tokens=usage.completion_tokens, seconds=seconds, text="".join(parts))
    return "".join(parts)


def labels(base_url: str, socket: str, turns: str) -> None:
    """Forty messages, each with a probability per label, over the Unix socket."""
    from hob.client import Client

    data = load("messages")
    client = Client(socket, app="labels")
    examples = "".join(f"Message: {text}\nTopic: {label}\n\n" for text, label in data["examples"])

    def one(message: list[str]) -> None:
        text, truth = message
        start = time.perf_counter()
        answer = client.classify(None, data["labels"], prompt=f"{examples}Message: {text}\nTopic:")
        probabilities = {entry["label"]: entry["probability"] for entry in answer["labels"]}
        seconds = time.perf_counter() - start
        emit(
            "request",
            ttft_s=seconds,
            tokens=0,
            seconds=seconds,
            text=text,
            label=answer["label"],
            truth=truth,
            probability=probabilities[answer["label"]],
        )

    start_when_told()
    _in_parallel(one, data["messages"], LABELS_IN_FLIGHT)
    emit("done")


def summaries(base_url: str, socket: str, turns: str) -> None:
    """A batch that nobody waits for: a title and a summary of each document, in the background class."""
    import openai

    headers = {"X-Hob-App": "summaries", "X-Hob-Class": "background"}
    client = openai.OpenAI(base_url=base_url, api_key="any", default_headers=headers, max_retries=0)

    def one(prompt: str) -> None:
        start = time.perf_counter()
        reply = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=SUMMARY_TOKENS,
            temperature=0,
        )
        seconds = time.perf_counter() - start
        tokens = reply.usage.completion_tokens if reply.usage else 0
        emit("request", ttft_s=seconds, tokens=tokens, seconds=seconds, text=reply.choices[0].message.content)

    orders = ("Summarise this in one sentence", "Give this a short title")
    prompts = [f"{order}:\n\n{document}" for document in load("documents") for order in orders]
    start_when_told()
    _in_parallel(one, prompts, SUMMARIES_IN_FLIGHT)
    emit("done")


def num_requests(program: str) -> int:
    """How many answers a program asks for: the denominator of its progress."""
    return {
        "chat": len(load("chat")["turns"]),
        "labels": len(load("messages")["messages"]),
        "summaries": 2 * len(load("documents")),
    }[program]


def start_when_told() -> str:
    """Wait for a line: imports are not what the demo measures."""
    emit("ready")
    return sys.stdin.readline()


def _in_parallel(work: Callable[[Any], None], items: list[Any], width: int) -> None:
    with ThreadPoolExecutor(width) as pool:
        for result in [pool.submit(work, item) for item in items]:
            result.result()


PROGRAMS = {"chat": chat, "labels": labels, "summaries": summaries}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--turns", choices=("turns", "after"), default="turns")
    options = parser.parse_args()
    PROGRAMS[options.program](options.base_url, options.socket, options.turns)
