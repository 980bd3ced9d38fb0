"""Pieces of OpenAI's reply format that chat and completions share. No logic."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from hob import __version__
from hob.api.generate import Totals
from hob.api.services import TextCodec
from hob.messages import ModelInfo
from hob.request import FinishReason

to_json = msgspec.json.Encoder().encode

FINISH: dict[FinishReason | None, str] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Stamp:
    """What all chunks of one reply repeat."""

    def __init__(self, prefix: str, model: ModelInfo) -> None:
        self.id = prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = model.name
        self.fingerprint = f"hob-{__version__}-{model.quantisation}-{model.isa}"

    def fields(self, kind: str) -> dict[str, Any]:
        """The common fields of an object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def event_head(self, kind: str) -> bytes:
        """An event up to where its other fields begin."""
        return b"data: " + to_json(self.fields(kind))[:-1]


def usage_object(totals: Totals) -> dict[str, Any]:
    """OpenAI's usage. A prompt that was given back and not computed has no cached tokens."""
    return {
        "prompt_tokens": totals.num_prompt_tokens,
        "completion_tokens": totals.num_output_tokens,
        "total_tokens": totals.num_prompt_tokens + totals.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": totals.num_cached_tokens or 0},
    }


def token_name(tokenizer: TextCodec, token_id: int) -> str:
    """A token as a string of its own: its text, its name if it is no text, 'bytes:\\xe2' if it is half a character."""
    raw = tokenizer.token_bytes(token_id)
    if not raw:
        return tokenizer.token_text(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
