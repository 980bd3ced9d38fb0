"""What is reserved before a model is loaded is no less than what it then takes, and not much more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.tiny import TinyShape, write_tiny_gguf

from hob.config import EngineConfig
from hob.engine.footprint import sizes_of
from hob.engine.local import LocalEngine, choose_kv_type
from hob.models.pack import ensure_packed
from hob.models.packed_file import open_packed

SHAPES = {
    "tiny": TinyShape(),
    "deep": TinyShape(num_layers=12, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=1024),
    "wide": TinyShape(num_layers=1, hidden_size=1024, num_heads=16, num_kv_heads=16, ffn_size=512),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("threads", "kv_type"), [(1, "f16"), (4, "q8")])
def test_the_estimate_holds(tmp_path: Path, name: str, threads: int, kv_type: str) -> None:
    packed = ensure_packed(write_tiny_gguf(tmp_path / f"{name}.gguf", quant="Q8_0", shape=SHAPES[name]))
    config = EngineConfig(threads=threads, kv_type=kv_type)
    sizes = sizes_of(name, str(packed), config, max_rows=512, max_logits=64)
    engine = LocalEngine(name, packed, config, max_rows=512, max_logits=64)
    assert engine.scratch_bytes <= sizes.scratch_bytes < 1.6 * engine.scratch_bytes + (4 << 20)
    assert engine.info.weight_bytes <= sizes.weight_bytes < engine.info.weight_bytes + 65536
    engine.open_pool(4)  # which holds its own figure against the engine's
    assert (engine.block_bytes, engine.page_bytes) == (sizes.block_bytes, sizes.page_bytes)


def test_kv_is_kept_in_8_bits_where_that_is_faster_and_keys_have_no_biases(tmp_path: Path) -> None:
    network = open_packed(ensure_packed(write_tiny_gguf(tmp_path / "tiny.gguf"))).network
    assert {isa: choose_kv_type("auto", isa, network)[0] for isa in ("portable", "avx2", "avx512", "amx")} == {
        "portable": "f16",
        "avx2": "f16",
        "avx512": "q8",
        "amx": "q8",
    }
    assert choose_kv_type("f16", "amx", network) == ("f16", "asked for")
    for other in (dataclasses.replace(network, qkv_bias=True), dataclasses.replace(network, head_dim=256)):
        assert choose_kv_type("auto", "amx", other)[0] == "f16"
