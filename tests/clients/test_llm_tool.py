"""The `llm` command-line tool, unchanged, with the file that README.md shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import needs

needs("llm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, url: str) -> Path:
    made = tmp_path_factory.mktemp("llm")
    (made / "extra-openai-models.yaml").write_text(
        f"- model_id: hob\n  model_name: fake\n  api_base: {url}/v1\n  api_key_name: hob\n  supports_schema: true\n"
    )
    (made / "keys.json").write_text(json.dumps({"hob": "any"}))
    return made


def llm(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llm", "-m", "hob", *words],
        env={**os.environ, "LLM_USER_PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("stream", [[], ["--no-stream"]])
def test_it_answers(folder: Path, stream: list[str]) -> None:
    options = ["-o", "max_tokens", "20", "-o", "seed", "5", *stream]
    assert llm(folder, "Hi", *options).strip()


def test_a_schema(folder: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    assert set(json.loads(llm(folder, "Hi", "--schema", json.dumps(schema), "--no-stream"))) == {"on"}
