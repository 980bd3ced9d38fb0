"""GGUF metadata of a tiny byte-level vocabulary: four special tokens, 256 bytes, some merges. For unit tests."""

from __future__ import annotations

from typing import Any

BYTE_0 = 4
"""Id of the token of byte 0; byte b has BYTE_0 + b."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
"""Control tokens but the last, which is user-defined: text that is always one token."""
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "< |"]


def alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    """What a file's metadata would be. `changes` replace or add keys of tokenizer.ggml; None removes one."""
    tokens = [*SPECIAL, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - len(SPECIAL)),
        "merges": list(MERGES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
