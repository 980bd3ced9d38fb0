"""Generations over the schemas of schemas.json, each checked by `jsonschema`, formats included.

    python -m tests.model.structured [--count 500]

A schema is as an app would write it; `ask` is what its user said. Nothing in the prompt describes the schema: that the
reply fits it is the grammar's doing alone.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from hob.client import Client
from tests.conftest import REPOSITORY
from tests.daemons import running

SCHEMAS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "schemas.json").read_text())
MAX_TOKENS = 600
NUM_TOGETHER = 16
TIMEOUT_S = 300


@dataclass(frozen=True)
class Made:
    """One generation."""

    schema: str
    text: str
    finish: str
    fault: str
    """Why it is not valid; empty if it is."""


def generate(client: Client, case: dict[str, Any], seed: int) -> Made:
    """Ask once, at temperature 1."""
    reply = client.chat(
        [{"role": "user", "content": case["ask"] + " Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": case["name"], "schema": case["schema"]}},
        max_tokens=MAX_TOKENS,
        seed=seed,
    )
    choice = reply["choices"][0]
    text = choice["message"]["content"]
    return Made(case["name"], text, choice["finish_reason"], fault_of(text, case["schema"]))


def fault_of(text: str, schema: dict[str, Any]) -> str:
    """Why a text is not what the schema describes. Empty: it is."""
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).split("\n", 1)[0]
    return ""


def generate_all(client: Client, count: int) -> list[Made]:
    """So many generations, of each schema as many, several at once."""
    work = [(SCHEMAS[i % len(SCHEMAS)], 1 + i // len(SCHEMAS)) for i in range(count)]
    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        return list(pool.map(lambda item: generate(client, *item), work))


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    model = REPOSITORY / ".cache/hob/models/smollm2-135m.gguf"
    with running(model=model) as daemon, Client(daemon.rundir.socket_path, timeout_s=TIMEOUT_S) as client:
        made = generate_all(client, args.count)
    bad = [one for one in made if one.fault]
    for one in bad:
        print(f"{one.schema} ({one.finish}): {one.fault}\n    {one.text!r}")
    print(f"{len(made) - len(bad)} of {len(made)} valid, {sum(one.finish != 'stop' for one in made)} cut")


if __name__ == "__main__":
    main()
