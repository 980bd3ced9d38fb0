"""Text for the fake engine: one token per byte of UTF-8, no stop token, a chat template of one line per message.

For tests and tries of the service without weights: `hob serve --model fake`.
"""

from __future__ import annotations

from typing import Any

from hob.models.tool_text import fold_tools

VOCAB_SIZE = 256


class ByteTokenizer:
    """Token i is byte i."""

    stop_token_ids: tuple[int, ...] = ()

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The bytes of the text; there are no special tokens to add or to parse."""
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """One byte, not necessarily a whole character."""
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        """The byte in hex."""
        return f"<0x{token_id:02X}>"


class ByteChat:
    """`role: content` lines and an open assistant line."""

    def encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of the conversation, tools and calls as text."""
        lines = [f"{message['role']}: {message['content']}\n" for message in fold_tools(messages, tools)]
        return list("".join([*lines, "assistant: "]).encode())
