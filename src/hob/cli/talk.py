"""`hob run`, `hob chat`, `hob classify`: ask the model from a terminal or a script."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hob.client import Client

System = Annotated[str | None, typer.Option(help="A system message.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0 always takes the most likely token.")]

APP = "hob-cli"


def run(
    prompt: Annotated[str, typer.Argument(help="What to ask. '-' reads it from stdin.")],
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    stream: Annotated[bool, typer.Option(help="Print as it comes, or all at the end.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the API's reply as one JSON object.")] = False,
) -> None:
    """Ask once. Starts a daemon if none runs.

    \b
    hob run "Name three rivers."
    hob run --temperature 0 --max-tokens 40 "One word for happy:"
    git diff | hob run --system "Summarise this change." -
    """
    from hob.cli.output import print_json

    text = sys.stdin.read() if prompt == "-" else prompt
    messages = _with_system(system, [{"role": "user", "content": text}])
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    with connected() as client:
        if json or not stream:
            reply = client.chat(messages, **options)
            print_json(reply) if json else print(reply["choices"][0]["message"]["content"])
            return
        _print_stream(client.chat(messages, stream=True, **options))


def chat(system: System = None, max_tokens: MaxTokens = 512, temperature: Temperature = 0.7) -> None:
    """Talk to the model. Starts a daemon if none runs.

    \b
    /reset   forget the conversation
    /exit    leave; so does Ctrl-D

    \b
    Without a terminal each line of stdin is one turn:
    printf 'Hi\\nAnd again\\n' | hob chat
    """
    at_terminal = sys.stdin.isatty()
    history = _with_system(system, [])
    num_kept = len(history)
    with connected() as client:
        if at_terminal:
            print("Talk to the model. /reset forgets, /exit leaves.", file=sys.stderr)
        for line in _lines(at_terminal):
            if line == "/exit":
                return
            if line == "/reset":
                del history[num_kept:]
                continue
            if line.startswith("/"):
                print(f"hob: unknown command '{line}'. Known: /reset, /exit", file=sys.stderr)
                continue
            history.append({"role": "user", "content": line})
            answer = _turn(client, history, max_tokens, temperature)
            history.append({"role": "assistant", "content": answer})


def classify(
    labels: Annotated[str, typer.Option(help="Labels, with commas between them.")],
    text: Annotated[str | None, typer.Argument(help="What to classify. '-' reads it from stdin.")] = None,
    data: Annotated[Path | None, typer.Option(help="A .csv, .tsv or .jsonl file instead of a text.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the CSV goes. Unset: to the terminal.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    instruction: Annotated[str | None, typer.Option(help="What the labels are about.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the API's reply as one JSON object.")] = False,
) -> None:
    """Give each label its exact probability. Starts a daemon if none runs.

    \b
    hob classify "I want my money back." --labels refund,praise,question
    hob classify --data messages.csv --labels urgent,later --output sorted.csv

    With examples of your own a trained head does better: see `hob task`.
    """
    from hob.cli.output import print_json

    names = [label.strip() for label in labels.split(",") if label.strip()]
    options: dict[str, Any] = {} if instruction is None else {"instruction": instruction}
    with connected() as client:
        if text is None:
            _classify_file(client, data, output, text_column, names, options)
            return
        reply = client.classify(sys.stdin.read() if text == "-" else text, names, **options)
    if json:
        print_json(reply)
        return
    width = max(len(name) for name in names)
    for entry in sorted(reply["labels"], key=lambda entry: -entry["probability"]):
        bar = "#" * round(40 * entry["probability"])
        print(f"{entry['label']:{width}}  {entry['probability']:6.3f}  {bar}".rstrip())


def _classify_file(
    client: Client,
    data: Path | None,
    output: Path | None,
    text_column: str,
    names: list[str],
    options: dict[str, Any],
) -> None:
    """Many in a call: their rows share the engine's steps."""
    from hob.tasks.files import classify_file

    def some(texts: list[str]) -> list[dict[str, Any]]:
        answers = client.classify(texts, names, **options)["data"]
        return [{"label": a["label"], "probability": max(e["probability"] for e in a["labels"])} for a in answers]

    classify_file(data, output, text_column, some)


@contextlib.contextmanager
def connected() -> Iterator[Client]:
    """A client of a daemon that runs, started if need be."""
    from hob.cli.background import ensure_daemon
    from hob.config import load_config

    config, _ = load_config()
    ensure_daemon(config)
    from hob.client import Client

    with Client(config.socket_path, app=APP) as client:
        yield client


def _with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return ([{"role": "system", "content": system}] if system else []) + messages


def _lines(at_terminal: bool) -> Iterator[str]:
    """What the user types, without empty lines. Ends with the input."""
    if at_terminal:
        import readline  # noqa: F401  arrow keys and history in input()
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            return
        if line:
            yield line


def _turn(client: Client, history: list[dict[str, Any]], max_tokens: int, temperature: float) -> str:
    """One answer, printed as it comes. Ctrl-C ends the answer, not the conversation."""
    parts: list[str] = []
    chunks = client.chat(history, stream=True, max_tokens=max_tokens, temperature=temperature)
    with contextlib.suppress(KeyboardInterrupt):
        _print_stream(chunks, parts)
    return "".join(parts)


def _print_stream(chunks: Iterable[dict[str, Any]], parts: list[str] | None = None) -> None:
    """Print the text of chunks as they come, and a line's end. `parts` gets what was printed."""
    try:
        for chunk in chunks:
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if parts is not None:
                    parts.append(text)
                print(text, end="", flush=True)
    finally:
        print(flush=True)
