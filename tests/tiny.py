"""A tiny random llama as a GGUF file: real format, real engine, nothing to fetch. Written with the `gguf` package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize


@dataclass(frozen=True)
class TinyShape:
    """The default has grouped heads and a tied head; all sizes are multiples of 32, so that it can be quantised."""

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 96
    context_length: int = 2048
    tied_head: bool = True
    can_serve: bool = False
    """With what a tokenizer and a chat need: one merge, and a template."""


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_SPECIAL = 3
"""<unk>, <|im_start|> and <|im_end|> come before the 256 bytes."""


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, in order of the byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in plain}
    for i, byte in enumerate(b for b in range(256) if b not in names):
        names[byte] = chr(256 + i)
    return [names[byte] for byte in range(256)]


def write_tiny_gguf(path: Path, seed: int = 0, quant: str = "F32", shape: TinyShape | None = None) -> Path:
    """Write the file and return its path. quant: F32, F16, Q4_0, Q4_1, Q8_0, ... for the matrices."""
    shape = shape or TinyShape()
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "llama")
    head_dim = shape.hidden_size // shape.num_heads
    vocab = ["<unk>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), *(["he"] if shape.can_serve else [])]
    out.add_block_count(shape.num_layers)
    out.add_context_length(shape.context_length)
    out.add_embedding_length(shape.hidden_size)
    out.add_feed_forward_length(shape.ffn_size)
    out.add_head_count(shape.num_heads)
    out.add_head_count_kv(shape.num_kv_heads)
    out.add_rope_dimension_count(head_dim)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(vocab))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(vocab)
    if shape.can_serve:
        out.add_token_merges(["h e"])
        out.add_chat_template(CHAT_TEMPLATE)
    out.add_token_types([3] * NUM_SPECIAL + [1] * (len(vocab) - NUM_SPECIAL))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)

    kind = gguf.GGMLQuantizationType[quant]

    def matrix(name: str, rows: int, cols: int, scale: float) -> None:
        values = (rng.standard_normal((rows, cols)) * scale).astype(np.float32)
        out.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    def vector(name: str, size: int) -> None:
        out.add_tensor(name, (1 + 0.1 * rng.standard_normal(size)).astype(np.float32))

    width, kv_width = shape.hidden_size, shape.num_kv_heads * head_dim
    matrix("token_embd.weight", len(vocab), width, 0.5)
    vector("output_norm.weight", width)
    if not shape.tied_head:
        matrix("output.weight", len(vocab), width, 0.2)
    for layer in range(shape.num_layers):
        prefix = f"blk.{layer}"
        vector(f"{prefix}.attn_norm.weight", width)
        vector(f"{prefix}.ffn_norm.weight", width)
        matrix(f"{prefix}.attn_q.weight", width, width, 0.2)
        matrix(f"{prefix}.attn_k.weight", kv_width, width, 0.2)
        matrix(f"{prefix}.attn_v.weight", kv_width, width, 0.2)
        matrix(f"{prefix}.attn_output.weight", width, width, 0.2)
        matrix(f"{prefix}.ffn_gate.weight", shape.ffn_size, width, 0.2)
        matrix(f"{prefix}.ffn_up.weight", shape.ffn_size, width, 0.2)
        matrix(f"{prefix}.ffn_down.weight", width, shape.ffn_size, 0.2)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
