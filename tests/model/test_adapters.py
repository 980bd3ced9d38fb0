"""LoRA adapters beside each other in one step: each sequence as alone, and near the model with the adapter merged."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from hob import native
from hob.config import EngineConfig
from hob.engine.adapters import CONFIG_FILE, TARGETS, WEIGHTS_FILE, digest_of, find_adapters, loaded_bytes, read_adapter
from hob.engine.base import Batch
from hob.engine.local import LocalEngine
from hob.errors import ModelFileError
from hob.models.pack import ensure_packed, open_packed
from tests.model.checkpoints import Shape, logits_of, make_checkpoint, write_gguf
from tests.model.runners import EngineRunner, ReferenceRunner, batch_of, worst_difference

Floats = NDArray[np.float32]
ISAS = native.available_isas()
SHAPES = {
    "llama": Shape(hidden_size=64, num_heads=2, num_kv_heads=1, ffn_size=96),
    "odd": Shape(),
    "gemma3": Shape("gemma3", hidden_size=40, num_heads=4, num_kv_heads=1, head_dim=32),
}


@dataclass(frozen=True)
class Lora:
    """What an adapter is like."""

    rank: int
    targets: tuple[str, ...]
    seed: int
    alpha: float = 16.0


WIDE = Lora(40, tuple(TARGETS), 1)
"""Ranks of three matrices together fill more than one panel."""
NARROW = Lora(3, ("q_proj", "v_proj", "down_proj"), 2)


def matrices(model: PreTrainedModel, lora: Lora) -> dict[str, tuple[Floats, Floats]]:
    """PEFT's name of each matrix -> A (rank, K) and B (N, rank)."""
    rng, found = np.random.default_rng(lora.seed), {}
    for name, weight in model.named_parameters():
        stem = name.removesuffix(".weight")
        if stem.rpartition(".")[2] in lora.targets:
            n, k = weight.shape
            a = rng.standard_normal((lora.rank, k)) / k**0.5
            b = rng.standard_normal((n, lora.rank)) / lora.rank**0.5
            found[stem] = a.astype(np.float32), b.astype(np.float32) * np.float32(0.3 * lora.rank / lora.alpha)
    return found


def write_peft(folder: Path, model: PreTrainedModel, lora: Lora, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in matrices(model, lora).items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(
        json.dumps({"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"} | config)
    )
    return folder


def write_gguf_adapter(path: Path, model: PreTrainedModel, lora: Lora, family: str) -> Path:
    """As llama.cpp's converter: B of llama's Q and K with its rows interleaved."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    out = gguf.GGUFWriter(path, family)
    out.add_type("adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", lora.alpha)
    for name, (a, b) in matrices(model, lora).items():
        _, _, layer, _, part = name.split(".")
        target = TARGETS[part]
        if family == "llama" and target in heads:
            b = np.ascontiguousarray(b.reshape(heads[target], 2, -1, lora.rank).swapaxes(1, 2).reshape(b.shape))
        out.add_tensor(f"blk.{layer}.{target}.weight.lora_a", a)
        out.add_tensor(f"blk.{layer}.{target}.weight.lora_b", b)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def merge(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    """W + alpha / rank * B A."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in matrices(model, lora).items():
            weights[f"{name}.weight"] += torch.from_numpy(b @ a) * (lora.alpha / lora.rank)
    return model


def token_ids(length: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, 101, length).tolist()
    return found


def together(*sequences: tuple[list[int], int]) -> Batch:
    """A step of several sequences, each (token ids, adapter), every row with its logits."""
    batches = [batch_of(ids, blocks=[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]) for i, (ids, _) in enumerate(sequences)]
    joined = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("token", "position", "index", "out", "target", "blocks")
    }
    starts = np.cumsum([0] + [len(ids) for ids, _ in sequences]).astype(np.int32)
    adapter = np.array([adapter for _, adapter in sequences], np.int32)
    tables = np.arange(0, 4 * len(sequences) + 1, 4, dtype=np.int32)
    return replace(batches[0], **joined, row_start=starts, table_start=tables, adapter=adapter)


@dataclass(frozen=True)
class Case:
    """A base with two adapters in both forms."""

    shape: Shape
    packed: Path
    peft: dict[int, Path]
    gguf: dict[int, Path]


LORAS = {1: WIDE, 2: NARROW}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name, shape in SHAPES.items():
        folder, model = tmp_path_factory.mktemp(f"adapters-{name}"), make_checkpoint(shape)
        packed = ensure_packed(write_gguf(model, folder / "base.gguf", family=shape.family))
        peft = {i: write_peft(folder / f"{i}", model, lora) for i, lora in LORAS.items()}
        ggufs = {i: write_gguf_adapter(folder / f"{i}.gguf", model, lora, shape.family) for i, lora in LORAS.items()}
        made[name] = Case(shape, packed, peft, ggufs)
    return made


def open_engine(case: Case, isa: str) -> EngineRunner:
    runner = EngineRunner(case.packed, isa)
    for adapter_id, path in case.peft.items():
        taken = runner.engine.load_adapter(adapter_id, path)
        assert taken == loaded_bytes(read_adapter(path, open_packed(case.packed).network))
    return runner


def open_reference(case: Case) -> ReferenceRunner:
    runner = ReferenceRunner(case.packed)
    for adapter_id, path in case.peft.items():
        pairs = read_adapter(path, runner.model.network)
        runner.model.adapters[adapter_id] = {f"blk.{p.layer}.{p.target}": (p.a, p.b) for p in pairs}
    return runner


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_near_the_merged_model_and_as_the_reference(cases: dict[str, Case], name: str, isa: str) -> None:
    case, ids = cases[name], token_ids(50, 1)
    engine, theirs = open_engine(case, isa), open_reference(case)
    base = logits_of(make_checkpoint(case.shape), ids)
    for adapter_id, lora in LORAS.items():
        merged = logits_of(merge(make_checkpoint(case.shape), lora), ids)
        assert worst_difference(merged, base) > 0.05, "the adapter does nothing: the test would prove nothing"
        batch = together((ids, adapter_id))
        assert worst_difference(engine.run(batch).logits, merged) < 1e-3
        assert worst_difference(theirs.run(batch).logits, merged) < 1e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [5, 40])
def test_each_sequence_has_the_bits_it_has_alone(cases: dict[str, Case], name: str, length: int, isa: str) -> None:
    """Several adapters and none in a step of few rows and of many."""
    runner = open_engine(cases[name], isa)
    sequences = [(token_ids(length + i, i), adapter) for i, adapter in enumerate((1, 0, 2, 1, 0))]
    found = runner.run(together(*sequences)).logits
    at = 0
    for ids, adapter in sequences:
        assert np.array_equal(found[at : at + len(ids)], runner.run(together((ids, adapter))).logits)
        at += len(ids)


@pytest.mark.parametrize("isa", ISAS)
def test_quantised_weights(cases: dict[str, Case], tmp_path: Path, isa: str) -> None:
    """The adapter's part is computed on what the layer reads before it is rounded to 8 bits."""
    shape = SHAPES["llama"]
    path = write_gguf(make_checkpoint(shape), tmp_path / "q.gguf", "Q8_0")
    case, ids = replace(cases["llama"], packed=ensure_packed(path)), token_ids(40, 3)
    runner = open_engine(case, isa)
    merged = logits_of(merge(make_checkpoint(shape), WIDE), ids)
    found = runner.run(together((token_ids(9, 4), 2), (ids, 1), (ids, 0))).logits
    assert worst_difference(found[9:49], merged) < 0.05
    assert np.array_equal(found[9:49], runner.run(together((ids, 1))).logits)


def test_the_base_stays_as_it_was(cases: dict[str, Case]) -> None:
    batch = together((token_ids(40, 1), 0))
    runner = open_engine(cases["llama"], ISAS[-1])
    assert np.array_equal(runner.run(batch).logits, EngineRunner(cases["llama"].packed, ISAS[-1]).run(batch).logits)
    runner.engine.drop_adapter(1)
    assert np.array_equal(runner.run(batch).logits, EngineRunner(cases["llama"].packed, ISAS[-1]).run(batch).logits)
    with pytest.raises(ValueError, match="sequence 0: adapter 1 is not loaded"):
        runner.run(together((token_ids(4, 1), 1)))


@pytest.mark.parametrize("name", SHAPES)
def test_gguf_and_peft_say_the_same(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    network = open_packed(case.packed).network
    for adapter_id in LORAS:
        ours, theirs = (read_adapter(paths[adapter_id], network) for paths in (case.gguf, case.peft))
        assert [(p.layer, p.target) for p in ours] == [(p.layer, p.target) for p in theirs]
        for p, q in zip(ours, theirs, strict=True):
            assert np.array_equal(p.a, q.a)
            assert np.array_equal(p.b, q.b)


def test_found_by_name(cases: dict[str, Case], tmp_path: Path) -> None:
    assert find_adapters(tmp_path / "none") == {}
    folder = cases["llama"].packed.parent / "adapters"
    write_peft(folder / "poems", make_checkpoint(SHAPES["llama"]), NARROW)
    write_gguf_adapter(folder / "code.gguf", make_checkpoint(SHAPES["llama"]), NARROW, "llama")
    assert find_adapters(folder) == {"code": folder / "code.gguf", "poems": folder / "poems"}


def test_an_engine_loads_those_of_its_model_and_says_which_it_leaves_out(
    cases: dict[str, Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_checkpoint(SHAPES["llama"])
    good = write_peft(tmp_path / "base" / "good", model, NARROW)
    write_peft(tmp_path / "base" / "bad", model, NARROW, use_dora=True)
    write_peft(tmp_path / "another" / "other", model, NARROW)
    packed = cases["llama"].packed
    bare = LocalEngine("base", packed, EngineConfig(threads=1), max_rows=64)
    engine = LocalEngine("base", packed, EngineConfig(threads=1, adapters=str(tmp_path)), max_rows=64)
    name = f"good@{digest_of(good)}"
    assert (engine.adapters, engine.info.adapters, bare.info.adapters) == ({name: 1}, [name], [])
    taken = loaded_bytes(read_adapter(good, open_packed(packed).network))
    assert engine.info.weight_bytes == bare.info.weight_bytes + taken
    assert "adapter 'bad' is not served: " in caplog.text
    spoil(good, lambda tensors: tensors.update({FIRST.format("A"): np.zeros((3, 64), np.float32)}))
    assert f"good@{digest_of(good)}" != name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "'use_dora' is True"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"lora_alpha": None}, "Expected PEFT's JSON with 'lora_alpha'"),
        ({"alpha_pattern": {"q_proj": 3}}, "'alpha_pattern'"),
        ({"lora_alpha": 10**400}, "Expected PEFT's JSON with 'lora_alpha'"),
        ({"lora_alpha": 1e300}, "not finite"),
    ],
)
def test_what_plain_lora_is_not_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    model = make_checkpoint(SHAPES["llama"])
    network = open_packed(ensure_packed(write_gguf(model, tmp_path / "base.gguf"))).network
    with pytest.raises(ModelFileError, match=message):
        read_adapter(write_peft(tmp_path / "a", model, NARROW, **config), network)


def spoil(folder: Path, change: Any) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def of_rank_0(tensors: dict[str, Floats]) -> dict[str, Floats]:
    a, b = FIRST.format("A"), FIRST.format("B")
    return {a: tensors[a][:0], b: tensors[b][:, :0].copy()}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST.format("B")), "attn_q of layer 0 has only one of A and B"),
        (lambda t: t.update({FIRST.format("A"): np.zeros((3, 8), np.float32)}), "made for another base"),
        (lambda t: t.update({FIRST.format("A"): np.full((3, 64), np.nan, np.float32)}), "not finite"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 64), np.float32)}),
            "Not supported",
        ),
        (lambda t: t.update({FIRST.format("A"): np.zeros((3, 64), np.float64)}), "of F64"),
        (lambda t: t.clear(), "no LoRA tensors"),
        (lambda t: t.update(of_rank_0(t)), "made for another base"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = make_checkpoint(SHAPES["llama"])
    network = open_packed(ensure_packed(write_gguf(model, tmp_path / "base.gguf"))).network
    folder = write_peft(tmp_path / "a", model, NARROW)
    assert read_adapter(folder, network)
    spoil(folder, change)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(folder, network)


def test_broken_files_are_refused(tmp_path: Path, cases: dict[str, Case]) -> None:
    network = open_packed(cases["llama"].packed).network
    folder = write_peft(tmp_path / "a", make_checkpoint(SHAPES["llama"]), NARROW)
    (folder / WEIGHTS_FILE).write_bytes(b"\xff" * 40)
    with pytest.raises(ModelFileError, match="Expected a safetensors file"):
        read_adapter(folder, network)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_adapter(folder, network)
    (folder / CONFIG_FILE).write_text('{"lora_alpha": ' + "[" * 100_000)
    with pytest.raises(ModelFileError, match="RecursionError"):
        read_adapter(folder, network)
    with pytest.raises(ModelFileError, match="not a LoRA adapter"):
        read_adapter(cases["llama"].packed.with_name("base.gguf"), network)
    with pytest.raises(ModelFileError, match="made for architecture 'gemma3'"):
        read_adapter(cases["gemma3"].gguf[1], network)


def test_rank_stabilised_scale_and_half_precision(tmp_path: Path, cases: dict[str, Case]) -> None:
    model, network = make_checkpoint(SHAPES["llama"]), open_packed(cases["llama"].packed).network
    plain = read_adapter(write_peft(tmp_path / "a", model, NARROW), network)
    stabilised = read_adapter(write_peft(tmp_path / "b", model, NARROW, use_rslora=True), network)
    np.testing.assert_allclose(stabilised[0].b, plain[0].b * 3**0.5, rtol=1e-6)
    spoil(tmp_path / "a", lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    np.testing.assert_allclose(read_adapter(tmp_path / "a", network)[0].a, plain[0].a, atol=1e-3)
