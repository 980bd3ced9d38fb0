"""Seeded random llama checkpoints, as `transformers` has them and as a GGUF file like the one llama.cpp's converter
would write: Q and K rows permuted, so that RoPE turns neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint."""

    hidden_size: int = 56
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 70
    vocab_size: int = 101
    num_layers: int = 3
    tied_head: bool = True
    rope_scaling: str = ""
    """'', 'linear' or 'llama3'."""
    head_dim: int = 0
    """0: hidden_size / num_heads."""


def make_checkpoint(shape: Shape, seed: int = 0) -> LlamaForCausalLM:
    """Weights of a spread that makes attention and gates do something, not the flat ones of an initialisation."""
    scaling = {
        "": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 2.5},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[shape.rope_scaling]
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.ffn_size,
        vocab_size=shape.vocab_size,
        num_hidden_layers=shape.num_layers,
        tie_word_embeddings=shape.tied_head,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        head_dim=shape.head_dim or shape.hidden_size // shape.num_heads,
        rope_parameters={"rope_theta": 10000.0, **scaling},
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * spread if "norm" in name else spread * 0.7 / weight.shape[-1] ** 0.5)
    return model


def logits_of(model: LlamaForCausalLM, token_ids: list[int]) -> NDArray[np.float32]:
    """(T, vocab) in float32."""
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].numpy()
    return found


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in top:
        return f"{top[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _interleaved(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows i and i + D / 2 of each head become neighbours."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(model: LlamaForCausalLM, path: Path, quant: str = "F32") -> Path:
    """The checkpoint as a GGUF file, its matrices in `quant`. Has no tokenizer."""
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_parameters["rope_type"] == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        out.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    kind = gguf.GGMLQuantizationType[quant]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight, gguf_name = parameter.detach().numpy(), _gguf_name(name)
        if num_heads := heads.get(gguf_name.split(".")[-2]):
            weight = _interleaved(weight, num_heads)
        if weight.ndim == 1:
            out.add_tensor(gguf_name, weight)
        else:
            out.add_tensor(gguf_name, quantize(weight, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
