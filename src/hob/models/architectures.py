"""What the metadata and tensors of a GGUF file mean, per architecture: a Network and the tensors it must have.

One entry of `ARCHITECTURES` per family that is supported. Key names are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (`llama.block_count`, ...). A tensor the network does not know
is an error: a weight that is left out without a word gives wrong answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hob.errors import ModelFileError
from hob.models.ggml_types import F32
from hob.models.gguf import GgufFile
from hob.models.network import Network
from hob.native.layout import PANEL

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape, row-major."""

ROPE_FREQS = "rope_freqs.weight"
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_SIZE = 1 << 24
"""Largest hidden, FFN, vocabulary or context size taken for real."""


Fields = dict[str, Any]
"""Values of Network's fields."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one family are read."""

    features: Callable[[_Keys, Network], Fields]
    """What the family has beside the common shape."""
    interleaved_rope: bool = False
    """Q and K rows are stored so that RoPE turns neighbours (2i, 2i + 1), not (i, i + rope_dim / 2)."""


def read_network(gguf: GgufFile) -> Network:
    """The network a file holds, its tensors checked to be all there, of the right shapes, and no others.

    Raises ModelFileError for an architecture, a feature, a size or a tensor that is not supported.
    """
    architecture = architecture_of(gguf)
    keys = _Keys(gguf, str(gguf.metadata["general.architecture"]))
    common = _read_common(keys)
    network = replace(common, **architecture.features(keys, common))
    _check_window(keys, network)
    _check_tensors(gguf, expected_shapes(network))
    return network


def architecture_of(gguf: GgufFile) -> Architecture:
    """The entry of `ARCHITECTURES` for a file. Raises ModelFileError listing those that are supported."""
    name = gguf.metadata.get("general.architecture")
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ModelFileError(f"{gguf.path}: architecture is {name!r:.80}. Supported: {supported}.")
    return found


def expected_shapes(network: Network) -> Shapes:
    """Every tensor a network of these sizes has."""
    hidden, ffn, vocab = network.hidden_size, network.ffn_size, network.vocab_size
    q_size, kv_size = network.num_heads * network.head_dim, network.num_kv_heads * network.head_dim
    layer: Shapes = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_size, hidden),
        "attn_k.weight": (kv_size, hidden),
        "attn_v.weight": (kv_size, hidden),
        "attn_output.weight": (hidden, q_size),
        "ffn_norm.weight": (hidden,),
    }
    if experts := network.num_experts:
        ffn = network.expert_ffn_size
        layer |= {
            "ffn_gate_inp.weight": (experts, hidden),
            "ffn_gate_exps.weight": (experts, ffn, hidden),
            "ffn_up_exps.weight": (experts, ffn, hidden),
            "ffn_down_exps.weight": (experts, hidden, ffn),
        }
    else:
        layer |= {"ffn_gate.weight": (ffn, hidden), "ffn_up.weight": (ffn, hidden), "ffn_down.weight": (hidden, ffn)}
    if network.qkv_bias:
        layer |= {"attn_q.bias": (q_size,), "attn_k.bias": (kv_size,), "attn_v.bias": (kv_size,)}
    if network.qk_norm:
        is_joint, head_dim = network.qk_norm_joint, network.head_dim
        layer["attn_q_norm.weight"] = (q_size if is_joint else head_dim,)
        layer["attn_k_norm.weight"] = (kv_size if is_joint else head_dim,)
    if network.post_norms:
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    shapes: Shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not network.tied_head:
        shapes["output.weight"] = (vocab, hidden)
    if network.rope_factors:
        shapes[ROPE_FREQS] = (network.rope_dim // 2,)
    return shapes | {f"blk.{i}.{name}": shape for i in range(network.num_layers) for name, shape in layer.items()}


def _read_common(keys: _Keys) -> Network:
    """Sizes, and what RoPE does: the same keys in all families."""
    gguf = keys.gguf
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := keys.number(name, 0.0, least=0.0):
            raise keys.fail(name, cap, "none or 0: soft caps are not computed, and left out they change the answers")
    hidden = keys.integer("embedding_length", 2)
    heads = keys.integer("attention.head_count", 1)
    kv_heads = keys.integer("attention.head_count_kv", 1, heads)
    if heads % kv_heads:
        raise keys.fail("attention.head_count_kv", kv_heads, f"a divisor of the {heads} heads")
    if hidden % heads and f"{keys.prefix}.attention.key_length" not in gguf.metadata:
        raise keys.fail("embedding_length", hidden, f"a multiple of the {heads} heads")
    head_dim = keys.integer("attention.key_length", 2, hidden // heads)
    if (value_length := keys.integer("attention.value_length", 2, head_dim)) != head_dim:
        raise keys.fail("attention.value_length", value_length, f"key_length, {head_dim}")
    rope_dim = keys.integer("rope.dimension_count", 2, head_dim)
    if rope_dim > head_dim or rope_dim % 2:
        raise keys.fail("rope.dimension_count", rope_dim, f"an even number up to the head's {head_dim}")
    return Network(
        architecture=keys.prefix,
        num_layers=keys.integer("block_count", 1, most=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=keys.integer("feed_forward_length", 2),
        vocab_size=_vocab_size(gguf),
        context_length=keys.integer("context_length", 1),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_scale=_rope_scale(keys),
        rope_factors=_rope_factors(gguf, rope_dim),
        tied_head="output.weight" not in gguf.tensors,
    )


def _llama(keys: _Keys, network: Network) -> Fields:
    if experts := keys.integer("expert_count", 0, 0):
        raise keys.fail("expert_count", experts, "0: of mixtures of experts, olmoe and qwen3moe are supported")
    return {"qkv_bias": "blk.0.attn_q.bias" in keys.gguf.tensors}


def _qwen2(keys: _Keys, network: Network) -> Fields:
    return {"qkv_bias": True}


def _qwen3(keys: _Keys, network: Network) -> Fields:
    return {"qk_norm": True}


def _gemma3(keys: _Keys, network: Network) -> Fields:
    """Norm weights are stored with their 1 added. Only its depth tells the 27B model, which scales scores otherwise."""
    is_27b = network.num_layers == 62
    return {
        "qk_norm": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(network.hidden_size),
        "attention_scale": math.sqrt(network.num_heads / network.hidden_size) if is_27b else 0.0,
        "sliding_window": keys.integer("attention.sliding_window", 1),
        "sliding_layers": _sliding_layers(keys, network.num_layers, default_period=6),
        "sliding_rope_theta": keys.number("rope.freq_base_swa", 10000.0),
    }


def _olmoe(keys: _Keys, network: Network) -> Fields:
    return {"qk_norm": True, "qk_norm_joint": True, **_experts(keys, network)}


def _qwen3moe(keys: _Keys, network: Network) -> Fields:
    return {"qk_norm": True, "normalise_experts": True, **_experts(keys, network)}


def _experts(keys: _Keys, network: Network) -> Fields:
    """Their number and size. Experts lie one after the other in panels of 32 outputs, which each must fill."""
    count = keys.integer("expert_count", 1, most=MAX_EXPERTS)
    size = keys.integer("expert_feed_forward_length", PANEL, network.ffn_size)
    for name, value in (("expert_feed_forward_length", size), ("embedding_length", network.hidden_size)):
        if value % PANEL:
            raise keys.fail(name, value, f"a multiple of {PANEL}")
    return {
        "num_experts": count,
        "num_active_experts": keys.integer("expert_used_count", 1, most=count),
        "expert_ffn_size": size,
    }


def _check_window(keys: _Keys, network: Network) -> None:
    """Raises where a family without sliding layers here is given a window. One as long as the context hides nothing."""
    name, context = "attention.sliding_window", network.context_length
    if not network.sliding_window and 0 < (window := keys.integer(name, 0, 0)) < context:
        expected = f"none, 0, or at least the context's {context}: in {keys.prefix} every row sees all before it here"
        raise keys.fail(name, window, f"{expected}, which would change the answers. Windows of gemma3 are computed")


def _sliding_layers(keys: _Keys, num_layers: int, default_period: int) -> list[bool]:
    """Every layer but the last of each period slides. Files say the period, each layer, or nothing."""
    name = "attention.sliding_window_pattern"
    found = keys.gguf.metadata.get(f"{keys.prefix}.{name}", default_period)
    if isinstance(found, list):
        if len(found) != num_layers or not all(isinstance(slides, bool) for slides in found):
            raise keys.fail(name, found, f"a yes or no for each of the {num_layers} layers")
        return found
    period = keys.integer(name, 1, default_period)
    return [i % period != period - 1 for i in range(num_layers)]


@dataclass(slots=True)
class _Keys:
    """Metadata of one architecture, each value checked. A key without a default is required."""

    gguf: GgufFile
    prefix: str

    def fail(self, name: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(f"{self.gguf.path}: {self.prefix}.{name} is {value!r:.60}. Expected {expected}.")

    def integer(self, name: str, least: int, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self.gguf.metadata.get(f"{self.prefix}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(name, value, f"a whole number of {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float | None = None) -> float:
        """Above 0, or from `least` on."""
        value = self.gguf.metadata.get(f"{self.prefix}.{name}", default)
        expected = "a positive number" if least is None else f"a number from {least} on"
        if isinstance(value, bool) or not isinstance(value, int | float) or not value < math.inf:
            raise self.fail(name, value, expected)
        if not (value > 0 if least is None else value >= least):
            raise self.fail(name, value, expected)
        return float(value)


def _vocab_size(gguf: GgufFile) -> int:
    """Rows of the embedding: what counts, and is at times more than the tokenizer's tokens."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{gguf.path}: no tensor 'token_embd.weight'. The file holds no model, or half of one.")
    rows = embedding.shape[0]
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", [])
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    if not 2 <= rows <= MAX_SIZE or num_tokens > rows:
        raise ModelFileError(
            f"{gguf.path}: the embedding has {rows} rows. Expected {max(num_tokens, 2)} to {MAX_SIZE}."
        )
    return rows


def _rope_scale(keys: _Keys) -> float:
    """Divisor of positions. Other kinds of scaling (yarn, longrope) change more than that and are refused."""
    kind = keys.gguf.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    if kind not in ("linear", "none"):
        raise keys.fail("rope.scaling.type", kind, "'linear' or 'none'")
    old = keys.number("rope.scale_linear", 1.0)
    return keys.number("rope.scaling.factor", old) if kind == "linear" else 1.0


def _rope_factors(gguf: GgufFile, rope_dim: int) -> list[float]:
    info = gguf.tensors.get(ROPE_FREQS)
    if info is None:
        return []
    if info.ggml_type != F32 or info.shape != (rope_dim // 2,):
        raise ModelFileError(
            f"{gguf.path}: '{ROPE_FREQS}' is {info.shape} of type {info.ggml_type}. Expected ({rope_dim // 2},) of F32."
        )
    factors = np.frombuffer(gguf.tensor_data(ROPE_FREQS), "<f4")
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelFileError(f"{gguf.path}: '{ROPE_FREQS}' holds {factors.min()} to {factors.max()}. Expected above 0.")
    return [float(value) for value in factors]


_IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd")
"""Tensors of old files that can be computed."""


def _check_tensors(gguf: GgufFile, expected: Shapes) -> None:
    for name, shape in expected.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{gguf.path}: no tensor '{name}' {shape}. The model is incomplete.")
        if info.shape != shape:
            raise ModelFileError(f"{gguf.path}: tensor '{name}' is {info.shape}. Its metadata expect {shape}.")
    others = [name for name in gguf.tensors if name not in expected and not _IGNORED.match(name)]
    if others:
        raise ModelFileError(
            f"{gguf.path}: {len(others)} tensors that a {gguf.metadata['general.architecture']} network does not have, "
            f"'{others[0]}' first. This variant is not supported."
        )


ARCHITECTURES = {
    "gemma3": Architecture(_gemma3),
    "llama": Architecture(_llama, interleaved_rope=True),
    "olmoe": Architecture(_olmoe),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3moe),
}
