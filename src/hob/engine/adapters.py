"""LoRA adapters: reading PEFT folders and GGUF files into pairs for the compute core.

    y = W x + scale * B (A x)        A (rank, K), B (N, rank); Hu et al. 2021, arXiv:2106.09685

An adapter belongs to one base: its pairs must fit that network's matrices. What an adapter file asks for beyond plain
LoRA on linear layers of attention and FFN (DoRA, trained embeddings, biases) is an error: leaving it out would give
another model than was trained. Rows of B that belong to Q and K are put into the order in which RoPE turns dimensions
(i, i + rope_dim / 2), as `models/pack.py` does with the weights; PEFT has them so, llama's GGUF files do not.

This module knows files and shapes; which sequence uses which adapter is the batch's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from hob.errors import ModelFileError
from hob.models import ggml_types as ggml
from hob.models.architectures import ARCHITECTURES, expected_shapes
from hob.models.gguf import GgufFile, open_gguf
from hob.models.network import Network
from hob.models.pack import canonical_order
from hob.native.layout import PANEL

Floats = NDArray[np.float32]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_ADAPTER_BYTES = 4 << 30
TARGETS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""Name of a matrix in Hugging Face's models -> in GGUF."""
_PEFT_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.(?:default\.)?weight"
)
_GGUF_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight\.lora_([ab])")


@dataclass(frozen=True, slots=True)
class AdapterPair:
    """What is added to one matrix."""

    layer: int
    target: str
    """'attn_q', 'ffn_down', ..."""
    a: Floats
    """(rank, K)"""
    b: Floats
    """(N, rank), the scale in it."""


@dataclass(slots=True)
class _Halves:
    a: Floats | None = None
    b: Floats | None = None


def read_adapter(path: Path, network: Network) -> list[AdapterPair]:
    """The pairs of a PEFT folder or a GGUF file, checked against the base.

    Raises ModelFileError naming what does not fit or is not supported.
    """
    try:
        return _read_peft(path, network) if path.is_dir() else _read_gguf(path, network)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read: {error.strerror}. Expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "or a GGUF file."
        ) from error


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> path of all adapters in a folder: NAME.gguf, or NAME/ with PEFT's files."""
    if not folder.is_dir():
        return {}
    files = {path.stem: path for path in sorted(folder.glob("*.gguf"))}
    return files | {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))}


def digest_of(path: Path) -> str:
    """SHA-256 of an adapter's file; of PEFT's two, of the settings and then the weights."""
    files = [path / CONFIG_FILE, path / WEIGHTS_FILE] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def loaded_bytes(pairs: list[AdapterPair]) -> int:
    """What `Model.add_adapter` will take for them: A of matrices that share an input in panels of 32 ranks together."""
    ranks: dict[tuple[int, str], tuple[int, int]] = {}
    total = 0
    for pair in pairs:
        key = pair.layer, _INPUT_OF.get(pair.target, pair.target)
        rank, k = pair.a.shape
        ranks[key] = ranks.get(key, (0, k))[0] + rank, k
        total += _ceil(len(pair.b)) * rank
    return 4 * (total + sum(_ceil(rank) * k for rank, k in ranks.values()))


_INPUT_OF = {"attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "ffn_gate": "gate_up", "ffn_up": "gate_up"}


def _ceil(count: int) -> int:
    return -(-count // PANEL) * PANEL


# ---- PEFT ----


def _read_peft(folder: Path, network: Network) -> list[AdapterPair]:
    scale_of = _peft_scale(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if weights.stat().st_size > MAX_ADAPTER_BYTES:
        raise ModelFileError(f"{weights} has {weights.stat().st_size:,} bytes. Expected at most {MAX_ADAPTER_BYTES:,}.")
    try:
        tensors = safetensors.deserialize(weights.read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{weights}: {error}. Expected a safetensors file.") from error
    halves: dict[tuple[int, str], _Halves] = {}
    for name, tensor in tensors:
        match = _PEFT_NAME.fullmatch(name)
        if match is None or match[2] not in TARGETS:
            raise ModelFileError(
                f"{weights}: tensor '{name[:120]}' is not LoRA on one of {', '.join(TARGETS)}. Not supported."
            )
        found = halves.setdefault((int(match[1]), TARGETS[match[2]]), _Halves())
        setattr(found, match[3].lower(), _safetensor(weights, name, tensor))
    return _pairs(weights, network, halves, scale_of, is_canonical=True)


@dataclass(frozen=True, slots=True)
class _Scale:
    alpha: float
    is_rank_stabilised: bool = False

    def of(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


_PEFT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False,),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
}
"""Settings that would change the arithmetic, and the values at which they do not."""


def _peft_scale(path: Path) -> _Scale:
    try:
        config = json.loads(path.read_text())
        alpha = float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: cannot be used: {error!r:.200}. Expected PEFT's JSON with 'lora_alpha'."
        ) from error
    for name, neutral in _PEFT_NEUTRAL.items():
        if config.get(name, neutral[0]) not in neutral:
            raise ModelFileError(f"{path}: '{name}' is {config[name]!r:.80}. Expected {neutral[0]!r}: not supported.")
    return _Scale(alpha, bool(config.get("use_rslora", False)))


def _safetensor(path: Path, name: str, tensor: dict[str, Any]) -> Floats:
    shape, kind, data = tensor["shape"], tensor["dtype"], tensor["data"]
    if len(shape) != 2 or kind not in ("F32", "F16", "BF16"):
        raise ModelFileError(
            f"{path}: tensor '{name[:120]}' is {shape} of {kind}. Expected a matrix of F32, F16, BF16."
        )
    return _floats(data, kind).reshape(shape)


def _floats(data: bytes | memoryview, kind: str) -> Floats:
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float32)


# ---- GGUF ----

_GGUF_KINDS = {ggml.F32: "F32", ggml.F16: "F16", ggml.BF16: "BF16"}


def _read_gguf(path: Path, network: Network) -> list[AdapterPair]:
    with open_gguf(path) as file:
        base = file.metadata.get("general.architecture")
        if file.metadata.get("general.type") != "adapter" or file.metadata.get("adapter.type") != "lora":
            raise ModelFileError(
                f"{path}: not a LoRA adapter: general.type is {file.metadata.get('general.type')!r:.40}."
            )
        if base != network.architecture:
            raise ModelFileError(f"{path}: made for architecture {base!r:.40}, the model is '{network.architecture}'.")
        alpha = file.metadata.get("adapter.lora.alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ModelFileError(f"{path}: adapter.lora.alpha is {alpha!r:.40}. Expected a number.")
        halves: dict[tuple[int, str], _Halves] = {}
        for name in file.tensors:
            match = _GGUF_NAME.fullmatch(name)
            if match is None or match[2] not in TARGETS.values():
                raise ModelFileError(
                    f"{path}: tensor '{name[:120]}' is not LoRA on one of {', '.join(TARGETS.values())}. Not supported."
                )
            found = halves.setdefault((int(match[1]), match[2]), _Halves())
            setattr(found, match[3], _gguf_matrix(file, name))
    is_canonical = not ARCHITECTURES[network.architecture].interleaved_rope
    return _pairs(path, network, halves, _Scale(float(alpha)), is_canonical)


def _gguf_matrix(file: GgufFile, name: str) -> Floats:
    info = file.tensors[name]
    if len(info.shape) != 2 or info.ggml_type not in _GGUF_KINDS:
        raise ModelFileError(
            f"{file.path}: tensor '{name}' is {info.shape} of type {info.ggml_type}. "
            "Expected a matrix of F32, F16 or BF16."
        )
    return _floats(bytes(file.tensor_data(name)), _GGUF_KINDS[info.ggml_type]).reshape(info.shape)


# ---- both ----


def _pairs(
    path: Path, network: Network, halves: dict[tuple[int, str], _Halves], scale: _Scale, is_canonical: bool
) -> list[AdapterPair]:
    if not halves:
        raise ModelFileError(f"{path}: no LoRA tensors in it.")
    shapes, pairs = expected_shapes(network), []
    for (layer, target), found in sorted(halves.items()):
        a, b, shape = found.a, found.b, shapes.get(f"blk.{layer}.{target}.weight")
        if a is None or b is None:
            raise ModelFileError(
                f"{path}: {target} of layer {layer} has only one of A and B. The adapter is incomplete."
            )
        if shape is None or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ModelFileError(
                f"{path}: {target} of layer {layer} has A {a.shape} and B {b.shape}; the model's matrix is {shape}. "
                "The adapter was made for another base."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # looked for in the next line
            b = b * np.float32(scale.of(a.shape[0]))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelFileError(f"{path}: {target} of layer {layer} holds values that are not finite.")
        heads = {"attn_q": network.num_heads, "attn_k": network.num_kv_heads}.get(target)
        if heads is not None and not is_canonical:
            b = b[canonical_order(network, heads)]
        pairs.append(AdapterPair(layer, target, np.ascontiguousarray(a), b))
    return pairs
