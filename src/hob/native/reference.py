"""The compute core in plain NumPy: what `csrc/` must compute, written to be read. Tests run over both.

Shapes: R rows, H hidden size, N outputs, K inputs, G = K / 32 groups, A heads, B KV heads, D head dimension. Knows
packed weights and batches; no files beyond `open_packed`'s, no threads, no speed. Sampling: `reference_sampling.py`.

Llama family: Touvron et al. 2023, arXiv:2302.13971; RoPE: Su et al. 2021, arXiv:2104.09864; grouped queries: Ainslie
et al. 2023, arXiv:2305.13245; Gemma 3: arXiv:2503.19786; Qwen 3: arXiv:2505.09388.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hob.models.network import Network
from hob.models.packed_file import Packed
from hob.native.layout import GROUP, Codes, Kind, decode, decode_floats

Floats = NDArray[np.float32]
Weight = Floats | Codes
"""A float matrix (N, K), or a quantised one."""


BLOCK_SIZE = 16
"""Tokens in a block of KV."""
OUT_LOGITS, OUT_SCORE, OUT_HIDDEN = 1, 2, 3
"""Values of `engine.base.Out`."""


class Batch(Protocol):
    """Anything shaped like `engine.base.Batch`, which says what the fields mean."""

    token: NDArray[np.int32]
    position: NDArray[np.int32]
    index: NDArray[np.int32]
    out: NDArray[np.uint8]
    target: NDArray[np.int32]
    row_start: NDArray[np.int32]
    table_start: NDArray[np.int32]
    blocks: NDArray[np.int32]
    adapter: NDArray[np.int32]
    num_tops: int
    layers: NDArray[np.int32]


def quantise_activations(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes (R, K) and scales (R, G) of rows (R, K): x is about s * q, s the largest of a group of 32 over 127."""
    groups = x.reshape(len(x), x.shape[1] // GROUP, GROUP)
    amax = np.abs(groups).max(axis=2)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    q = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return q.reshape(x.shape), amax / np.float32(127)


def linear(x: Floats, weight: Weight) -> Floats:
    """(R, K) -> (R, N). Quantised: 8-bit activations, whole-number dot products in a group, groups added in order."""
    if not isinstance(weight, Codes):
        y: Floats = x @ weight.T
        return y
    q, s = quantise_activations(x)
    w = weight.q.astype(np.float32) - weight.kind.zero  # products of codes stay exact: 32 * 127 * 255 < 2 ** 24
    d = weight.d.astype(np.float32)
    y = np.zeros((len(x), len(w)), np.float32)
    for g in range(s.shape[1]):
        span = slice(g * GROUP, (g + 1) * GROUP)
        q_group = q[:, span].astype(np.float32)
        y += s[:, g, None] * d[None, :, g] * (q_group @ w[:, span].T)
        if weight.m is not None:
            y += (s[:, g] * q_group.sum(axis=1))[:, None] * weight.m[None, :, g].astype(np.float32)
    return y


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """(R, H): each row scaled to a mean square of 1, then by `weight` (H,)."""
    mean_square = np.mean(np.square(x, dtype=np.float32), axis=-1, keepdims=True)
    y: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return y


def rope_angles(network: Network, position: NDArray[np.int32], is_sliding: bool = False) -> NDArray[np.float64]:
    """(R, rope_dim / 2): how far each pair of dimensions turns at each position, in a layer that slides or not."""
    rope_dim = network.rope_dim or network.head_dim
    exponent = -np.arange(0, rope_dim, 2) / rope_dim
    if is_sliding and network.sliding_rope_theta:
        return position[:, None] * network.sliding_rope_theta**exponent
    frequency = network.rope_theta**exponent
    if network.rope_factors:
        frequency = frequency / np.array(network.rope_factors)
    angles: NDArray[np.float64] = position[:, None] / network.rope_scale * frequency
    return angles


def rope(x: Floats, angles: NDArray[np.float64]) -> Floats:
    """Turn dimensions (i, i + rope_dim / 2) of each head of (R, A, D); dimensions past rope_dim stay."""
    half = angles.shape[1]
    cos, sin = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def silu(x: Floats) -> Floats:
    """x * sigmoid(x)."""
    y: Floats = x / (1 + np.exp(-x))
    return y


def gelu_tanh(x: Floats) -> Floats:
    """GELU by its tanh form: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    y: Floats = 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return y


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def attention(
    query: Floats, keys: Floats, values: Floats, lengths: NDArray[np.int32], scale: float, window: int = 0
) -> Floats:
    """(R, A, D): row r of `query` sees the first lengths[r] of `keys` and `values` (T, B, D), or the `window` latest of
    those."""
    group = query.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    query, keys, values = (x.transpose(1, 0, 2) for x in (query, keys, values))  # (A, R or T, D)
    scores = query @ keys.transpose(0, 2, 1) * np.float32(scale)  # (A, R, T)
    place = np.arange(keys.shape[1])[None, :]
    scores[:, place >= lengths[:, None]] = -np.inf
    if window:
        scores[:, place < lengths[:, None] - window] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    y: Floats = (weights @ values).transpose(1, 0, 2)
    return y


def log_softmax(logits: Floats) -> Floats:
    """(R, V) log-probabilities, summed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    y: Floats = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)
    return y


def quantise_heads(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes and scales (R, B) of heads (R, B, D): x is about scale * code, the largest of a head about 127 of it."""
    scale = (np.abs(x).max(axis=2) / np.float32(127)).astype(np.float16)
    inverse = np.divide(np.float32(1), scale, out=np.zeros(scale.shape, np.float32), where=scale > 0)
    return np.rint(np.clip(x * inverse[:, :, None], -127, 127)).astype(np.int8), scale


class KvPool:
    """Keys (rotated) and values of `num_blocks` blocks, in float16 or 8 bits (int8). float32 shows what those cost."""

    def __init__(self, network: Network, num_blocks: int, dtype: type[np.floating[Any] | np.int8] = np.float16) -> None:
        shape = (network.num_layers, num_blocks, BLOCK_SIZE, network.num_kv_heads, network.head_dim)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.scales = np.zeros((2, *shape[:-1]), np.float16)
        """Of each token and head's keys and values, where those are codes of 8 bits."""

    def write(self, layer: int, slots: NDArray[np.int64], keys: Floats, values: Floats) -> None:
        """Store (R, B, D) at slots (R,), block * 16 + place."""
        for part, stored, scales in zip((keys, values), (self.keys, self.values), self.scales, strict=True):
            into = stored[layer].reshape(-1, *part.shape[1:])
            if stored.dtype == np.int8:
                into[slots], scales[layer].reshape(-1, part.shape[1])[slots] = quantise_heads(part)
            else:
                into[slots] = part

    def read(self, layer: int, slots: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Keys and values (T, B, D) at slots (T,)."""
        kept = [part[layer].reshape(-1, *part.shape[3:])[slots].astype(np.float32) for part in (self.keys, self.values)]
        for part, scales in zip(kept, self.scales, strict=True):
            if self.keys.dtype == np.int8:
                part *= scales[layer].reshape(-1, part.shape[1])[slots][:, :, None].astype(np.float32)
        return kept[0], kept[1]


@dataclass
class Result:
    """What the rows of a step were asked for, each in the order of its rows."""

    logits: Floats
    """(n, vocab_size)"""
    logprob: Floats
    """(n,) of the targets of SCORE rows"""
    top_ids: NDArray[np.int32]
    """(n, num_tops) most likely first"""
    top_logprobs: Floats
    """(n, num_tops)"""
    hidden: Floats
    """(n, L, H)"""


class Model:
    """A packed model, its weights decoded. `forward` is the step of engine/base.py."""

    def __init__(self, packed: Packed) -> None:
        self.network = packed.network
        self.weights: dict[str, Weight] = {}
        self.adapters: dict[int, dict[str, tuple[Floats, Floats]]] = {}
        """By id: A (rank, K) and B (N, rank) of the matrices that are adapted, by name without '.weight'."""
        for tensor in packed.tensors:
            data, kind = packed.read_tensor(tensor), Kind(tensor.kind)
            self.weights[tensor.name] = (
                decode_floats(data, tensor.rows, tensor.cols)
                if kind is Kind.F32
                else decode(kind, data, tensor.rows, tensor.cols)
            )

    def forward(self, pool: KvPool, batch: Batch) -> Result:
        """Compute the batch's rows and write their KV."""
        x = self._embed(batch.token)
        residuals = [x]
        for layer in range(self.network.num_layers):
            x = x + self._post_norm(layer, "attention", self._attention(layer, x, pool, batch))
            x = x + self._post_norm(layer, "ffw", self._ffn(layer, x, batch))
            residuals.append(x)
        x = rms_norm(x, self._vector("output_norm.weight"), self.network.rms_eps)
        wanted = batch.layers.tolist() or [self.network.num_layers]
        states = np.stack([*residuals[:-1], x], axis=1)[:, wanted]
        return self._outputs(x, states, batch)

    def _embed(self, token: NDArray[np.int32]) -> Floats:
        weight, scale = self.weights["token_embd.weight"], np.float32(self.network.embedding_scale)
        if not isinstance(weight, Codes):
            return weight[token] * scale
        m = None if weight.m is None else weight.m[token]
        return Codes(weight.kind, weight.q[token], weight.d[token], m).dequantise() * scale

    def _post_norm(self, layer: int, part: str, x: Floats) -> Floats:
        if not self.network.post_norms:
            return x
        return rms_norm(x, self._vector(f"blk.{layer}.post_{part}_norm.weight"), self.network.rms_eps)

    def _attention(self, layer: int, x: Floats, pool: KvPool, batch: Batch) -> Floats:
        net, name = self.network, f"blk.{layer}.attn"
        is_sliding = bool(net.sliding_layers) and net.sliding_layers[layer]
        angles = rope_angles(net, batch.position, is_sliding)
        normed = rms_norm(x, self._vector(f"{name}_norm.weight"), net.rms_eps)
        query = rope(self._normed_heads(normed, f"{name}_q", net.num_heads, batch), angles)
        keys = rope(self._normed_heads(normed, f"{name}_k", net.num_kv_heads, batch), angles)
        values = self._heads(normed, f"{name}_v", net.num_kv_heads, batch)
        scale, window = net.attention_scale or net.head_dim**-0.5, net.sliding_window if is_sliding else 0
        attended = np.empty_like(query)
        for s in range(len(batch.row_start) - 1):
            rows = slice(batch.row_start[s], batch.row_start[s + 1])
            blocks = batch.blocks[batch.table_start[s] : batch.table_start[s + 1]].astype(np.int64)
            slots = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()
            lengths = batch.index[rows] + 1
            pool.write(layer, slots[batch.index[rows]], keys[rows], values[rows])
            seen = pool.read(layer, slots[: lengths.max(initial=0)])
            attended[rows] = attention(query[rows], *seen, lengths, scale, window)
        return self._linear(attended.reshape(len(x), -1), f"{name}_output", batch)

    def _linear(self, x: Floats, name: str, batch: Batch) -> Floats:
        """A linear layer, each sequence with its adapter: Hu et al. 2021, arXiv:2106.09685."""
        y = linear(x, self.weights[f"{name}.weight"])
        for s, adapter in enumerate(batch.adapter):
            if adapter and name in self.adapters[adapter]:
                a, b = self.adapters[adapter][name]
                rows = slice(batch.row_start[s], batch.row_start[s + 1])
                y[rows] += x[rows] @ a.T @ b.T
        return y

    def _heads(self, x: Floats, name: str, num_heads: int, batch: Batch) -> Floats:
        y = self._linear(x, name, batch)
        if self.network.qkv_bias:
            y += self._vector(f"{name}.bias")
        return y.reshape(len(x), num_heads, self.network.head_dim)

    def _normed_heads(self, x: Floats, name: str, num_heads: int, batch: Batch) -> Floats:
        heads = self._heads(x, name, num_heads, batch)
        if not self.network.qk_norm:
            return heads
        weight = self._vector(f"{name}_norm.weight")
        y: Floats = rms_norm(heads.reshape(len(x), -1, len(weight)), weight, self.network.rms_eps).reshape(heads.shape)
        return y

    def _ffn(self, layer: int, x: Floats, batch: Batch) -> Floats:
        name = f"blk.{layer}.ffn"
        normed = rms_norm(x, self._vector(f"{name}_norm.weight"), self.network.rms_eps)
        if self.network.num_experts:
            return self._experts(layer, normed)
        gate, up = self._linear(normed, f"{name}_gate", batch), self._linear(normed, f"{name}_up", batch)
        return self._linear(ACTIVATIONS[self.network.activation](gate) * up, f"{name}_down", batch)

    def _experts(self, layer: int, normed: Floats) -> Floats:
        """Each row by the experts its router likes best, in that order. Shazeer et al. 2017, arXiv:1701.06538."""
        net, name = self.network, f"blk.{layer}.ffn"
        scores = np.exp(log_softmax(linear(normed, self.weights[f"{name}_gate_inp.weight"])))
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : net.num_active_experts]
        share = np.take_along_axis(scores, chosen, axis=1)
        if net.normalise_experts:
            share /= share.sum(axis=1, keepdims=True)
        y = np.zeros_like(normed)
        for place in range(net.num_active_experts):
            for expert in np.unique(chosen[:, place]):
                rows = chosen[:, place] == expert
                gate, up = (
                    linear(normed[rows], self._expert(f"{name}_{part}_exps", expert)) for part in ("gate", "up")
                )
                out = linear(ACTIVATIONS[net.activation](gate) * up, self._expert(f"{name}_down_exps", expert))
                y[rows] += share[rows, place, None] * out
        return y

    def _expert(self, name: str, expert: int) -> Weight:
        """One expert's rows of a matrix that holds all."""
        weight = self.weights[f"{name}.weight"]
        size = len(weight.q if isinstance(weight, Codes) else weight) // self.network.num_experts
        rows = slice(expert * size, (expert + 1) * size)
        if not isinstance(weight, Codes):
            return weight[rows]
        return Codes(weight.kind, weight.q[rows], weight.d[rows], None if weight.m is None else weight.m[rows])

    def _outputs(self, x: Floats, states: Floats, batch: Batch) -> Result:
        head = self.weights["token_embd.weight" if self.network.tied_head else "output.weight"]
        is_score = batch.out == OUT_SCORE
        logprobs = log_softmax(linear(x[is_score], head))
        tops = np.argsort(-logprobs, axis=1, kind="stable")[:, : batch.num_tops].astype(np.int32)
        targets = batch.target[is_score]
        return Result(
            logits=linear(x[batch.out == OUT_LOGITS], head),
            logprob=logprobs[np.arange(len(targets)), targets],
            top_ids=tops,
            top_logprobs=np.take_along_axis(logprobs, tops, axis=1),
            hidden=states[batch.out == OUT_HIDDEN],
        )

    def _vector(self, name: str) -> Floats:
        weight = self.weights[name]
        assert not isinstance(weight, Codes)
        vector: Floats = weight[0]
        return vector
