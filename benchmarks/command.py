"""What benchmarks of a daemon share as commands: `--model`, `--json`, and one result for people or machines."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

Result = dict[str, Any]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--model` and `--json`, whose help is the module's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name or path for `hob serve`")
    parser.add_argument("--json", action="store_true")
    return parser


def execute(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], Coroutine[Any, Any, Result]],
    show: Callable[[Result], None],
) -> None:
    """Parse, run, and print the result: as one JSON object, or by `show`."""
    args = parser.parse_args()
    result = asyncio.run(run(args))
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
