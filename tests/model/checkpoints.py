"""Seeded random checkpoints of each family, as `transformers` has them and as a GGUF file like the one llama.cpp's
converter would write: llama's Q and K rows permuted, so that RoPE turns neighbours; 1 added to gemma's norms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint."""

    family: str = "llama"
    """GGUF's general.architecture."""
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
    num_experts: int = 0
    num_active_experts: int = 0


_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}
"""Where transformers' name of a family is not GGUF's."""
SLIDING_WINDOW = 20


def _family_config(shape: Shape) -> dict[str, Any]:
    if shape.family == "gemma3":
        # Two sliding layers of three, not five of six: a small model has few layers.
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(shape.num_layers)]
        return {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": kinds,
            "query_pre_attn_scalar": shape.head_dim,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    if shape.num_experts:
        return {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_active_experts,
            "moe_intermediate_size": shape.ffn_size,
            "norm_topk_prob": shape.family == "qwen3moe",
        }
    return {}


def make_checkpoint(shape: Shape, seed: int = 0) -> PreTrainedModel:
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
    fields = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.ffn_size,
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": shape.tied_head,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "head_dim": shape.head_dim or shape.hidden_size // shape.num_heads,
        "rope_parameters": {"rope_theta": 10000.0, **scaling},
        "attn_implementation": "eager",
    }
    config = AutoConfig.for_model(_MODEL_TYPES.get(shape.family, shape.family), **{**fields, **_family_config(shape)})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_((0 if shape.family == "gemma3" else 1) + 0.2 * spread)
            else:
                weight.copy_(spread * 0.7 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.3 * spread)
    return model


def logits_of(model: PreTrainedModel, token_ids: list[int]) -> NDArray[np.float32]:
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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _gguf_name(name: str, family: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in top:
        return f"{top[name]}.weight"
    stem, _, kind = name.rpartition(".")
    _, _, layer, part = stem.split(".", 3)
    names = _NAMES | (_GEMMA_NAMES if family == "gemma3" else {})
    return f"blk.{layer}.{names[part]}.{kind}"


def _interleaved(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows i and i + D / 2 of each head become neighbours."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _expert_matrices(name: str, weight: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """(E, N, K) by GGUF's names; transformers keeps gate and up in one."""
    if name.endswith("down_proj"):
        return {"ffn_down_exps": weight}
    gate, up = np.split(weight, 2, axis=1)
    return {"ffn_gate_exps": np.ascontiguousarray(gate), "ffn_up_exps": np.ascontiguousarray(up)}


def _add_rope(out: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """RoPE's base, its scaling and, for Llama 3's, the factors that llama.cpp's converter computes."""
    config = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        out.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))


def write_gguf(model: PreTrainedModel, path: Path, quant: str = "F32", family: str = "llama") -> Path:
    """The checkpoint as a GGUF file, its matrices in `quant`. Has no tokenizer."""
    config = model.config
    out = gguf.GGUFWriter(path, family)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(out, model)
    if family == "gemma3":
        out.add_sliding_window(config.sliding_window)
        out.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if "num_experts_per_tok" in config:
        out.add_expert_count(config.num_experts)
        out.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3moe":
        out.add_expert_feed_forward_length(config.moe_intermediate_size)
    kind = gguf.GGMLQuantizationType[quant]
    is_permuted = family == "llama"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if is_permuted else {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if ".experts." in name:
            for part, stacked in _expert_matrices(name, weight).items():
                out.add_tensor(f"blk.{name.split('.')[2]}.{part}.weight", quantize(stacked, kind), raw_dtype=kind)
            continue
        gguf_name = _gguf_name(name, family)
        if family == "gemma3" and "norm" in name:
            weight = weight + 1
        if num_heads := heads.get(gguf_name.split(".")[-2]):
            weight = _interleaved(weight, num_heads)
        if weight.ndim == 1 or "ffn_gate_inp" in gguf_name:
            out.add_tensor(gguf_name, weight)
        else:
            out.add_tensor(gguf_name, quantize(weight, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
