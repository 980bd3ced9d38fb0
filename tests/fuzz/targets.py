"""What is fuzzed: for each kind of hostile input valid ones to begin with, ways to change them, and a use of one.

`run` does all that the service would do, down to a step of the compute core, and returns a word for how it went. A
HobError is the right answer to a wrong input; any other exception is a finding, as is a dead process.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save

from hob.api.grammars import grammar_of
from hob.api.schema import CompletionRequest
from hob.config import EngineConfig
from hob.engine.adapters import CONFIG_FILE, WEIGHTS_FILE
from hob.engine.base import Batch, Draw, Out
from hob.engine.grammar import Grammars, Masks
from hob.engine.local import LocalEngine
from hob.errors import InvalidRequest
from hob.models.chat import ChatEncoder
from hob.models.gguf import open_gguf
from hob.models.pack import pack
from hob.models.packed_file import FIXED, data_offset_of
from hob.models.tokenizer import Tokenizer
from hob.request import SamplingParams
from tests.fuzz.mutations import Field, change_bytes, change_text, change_tree, set_number
from tests.tiny import CHAT_TEMPLATE, TinyShape, write_tiny_gguf

TEXTS: dict[str, list[str]] = json.loads(Path(__file__).with_name("texts.json").read_text())
"""Templates and grammars to begin with, and pieces to put into them."""
SHAPE = TinyShape(1, 32, 2, 1, 32, context_length=256, can_serve=True)
QUANTS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
HELLO = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Name a river."},
]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}]


class Target(Protocol):
    """One kind of input."""

    def seeds(self) -> list[bytes]:
        """Valid inputs."""
        ...

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """An input made from another."""
        ...

    def run(self, data: bytes) -> str:
        """Use it as the service would. Raises HobError for what is wrong with it."""
        ...


def step(engine: LocalEngine, adapter: int = 0) -> str:
    """Three rows, and a token drawn in two ways after the last."""
    rows = np.arange(3, dtype=np.int32)
    batch = Batch(
        token=np.array([3, engine.info.vocab_size - 1, 5], np.int32),
        position=rows,
        index=rows,
        out=np.array([Out.NONE, Out.SCORE, Out.LOGITS], np.uint8),
        target=np.zeros(3, np.int32),
        row_start=np.array([0, 3], np.int32),
        table_start=np.array([0, 1], np.int32),
        blocks=np.array([1], np.int32),
        adapter=np.array([adapter], np.int32),
        num_tops=2,
    )
    try:
        assert engine.forward(batch).is_done
        for params in (SamplingParams(temperature=0.0, logprobs=2), SamplingParams(top_k=5, top_p=0.9, min_p=0.1)):
            drawn = engine.sample([Draw(params, 0, 3, [3, 4, 5], 1)])[0].token_id
            assert 0 <= drawn < engine.info.vocab_size, drawn
    except RuntimeError as error:
        if "not finite" in str(error):  # as `Engine` promises of weights that are not; the service ends the request
            return str(error)
        raise
    return "computed"


def open_engine(path: Path) -> LocalEngine:
    """Two threads and two blocks."""
    engine = LocalEngine("fuzz", path, EngineConfig(threads=2), max_rows=4, max_logits=2)
    engine.open_pool(2)
    return engine


class GgufTarget:
    """A model file: read, packed, its vocabulary and template used, loaded, and computed with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path, self._packed = folder / "m.gguf", folder / "m.hobpack"

    def seeds(self) -> list[bytes]:
        """Every number format, with and without a head of its own."""
        shapes = [(quant, SHAPE) for quant in QUANTS] + [("F32", replace(SHAPE, tied_head=False))]
        return [write_tiny_gguf(self._path, 1, quant, shape).read_bytes() for quant, shape in shapes]

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """Mostly at the numbers of the header."""
        return _change_gguf(data, rng, corpus)

    def run(self, data: bytes) -> str:
        """As `hob serve` with it would."""
        self._path.write_bytes(data)
        self._packed.unlink(missing_ok=True)
        pack(self._path, self._packed, lambda done, total: None)
        with open_gguf(self._path) as file:
            tokenizer = Tokenizer(file.metadata)
            chat = ChatEncoder.from_metadata(file.metadata, tokenizer)
        tokenizer.decode(chat.encode(HELLO))
        for token in range(tokenizer.vocab_size):
            tokenizer.token_bytes(token)
        engine = open_engine(self._packed)
        try:
            return step(engine)
        finally:
            engine.close()


def _change_gguf(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    fields = gguf_fields(data)
    if fields and rng.random() < 0.8:
        return set_number(data, rng.choice(fields), rng)
    return change_bytes(data, rng, corpus)


def gguf_fields(data: bytes) -> list[Field]:
    """Where the numbers of a GGUF header lie, as far as it makes sense."""
    fields: list[Field] = [(4, 4), (8, 8), (16, 8)]
    place = 24

    def number(width: int) -> int:
        nonlocal place
        fields.append((place, width))
        place += width
        if place > len(data):
            raise ValueError
        return int.from_bytes(data[place - width : place], "little")

    def skip_text() -> None:
        nonlocal place
        length = number(8)
        fields.append((place, 1))
        place += length

    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    try:
        num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)
        for _ in range(min(num_keys, 1000)):
            skip_text()
            kind = number(4)
            count = 1
            if kind == 9:
                kind, count = number(4), number(8)
            for i in range(min(count, 1000)):
                if kind == 8:
                    skip_text()
                elif i < 4:
                    number(widths[kind])
                else:
                    place += widths[kind]
        for _ in range(min(num_tensors, 1000)):
            skip_text()
            for _ in range(min(number(4), 8)):
                number(8)
            number(4)
            number(8)
    except (ValueError, KeyError, struct.error):
        pass
    return [field for field in fields if field[0] + field[1] <= len(data)]


class PackedTarget:
    """A packed file under our name: loaded and computed with. Its header's CRC is made right after a change."""

    def __init__(self, folder: Path) -> None:
        self._path, self._source = folder / "p.hobpack", folder / "p.gguf"

    def seeds(self) -> list[bytes]:
        """Made from the model files."""
        found = []
        for quant in QUANTS:
            self._path.unlink(missing_ok=True)
            pack(write_tiny_gguf(self._source, 1, quant, SHAPE), self._path, lambda done, total: None)
            found.append(self._path.read_bytes())
        return found

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """Mostly in the header's JSON."""
        if rng.random() < 0.8:
            try:
                magic, version, length, _, _, rest = FIXED.unpack_from(data)
                header = json.loads(data[FIXED.size : FIXED.size + length])
            except (ValueError, struct.error, RecursionError):
                return change_bytes(data, rng, corpus)
            text = json.dumps(change_tree(header, rng)).encode()
            body = data[data_offset_of(length) :]
            total = data_offset_of(len(text)) + len(body)
            fixed = FIXED.pack(magic, version, len(text), total, zlib.crc32(text), rest)
            return (fixed + text).ljust(data_offset_of(len(text)), b"\0") + body
        return change_bytes(data, rng, corpus)

    def run(self, data: bytes) -> str:
        """As the engine process would."""
        self._path.write_bytes(data)
        engine = open_engine(self._path)
        try:
            return step(engine)
        finally:
            engine.close()


class AdapterTarget:
    """A LoRA adapter, a GGUF file or PEFT's two files in one input, loaded beside a model and computed with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        packed = folder / "base.hobpack"
        packed.unlink(missing_ok=True)
        pack(write_tiny_gguf(folder / "base.gguf", 1, "Q8_0", SHAPE), packed, lambda done, total: None)
        self._engine = open_engine(packed)

    def seeds(self) -> list[bytes]:
        """One of all matrices and one of few, in both formats."""
        kv_width = SHAPE.hidden_size // SHAPE.num_heads * SHAPE.num_kv_heads
        shapes = {
            "q_proj": (SHAPE.hidden_size, SHAPE.hidden_size),
            "k_proj": (kv_width, SHAPE.hidden_size),
            "v_proj": (kv_width, SHAPE.hidden_size),
            "down_proj": (SHAPE.hidden_size, SHAPE.ffn_size),
        }
        rng, found = np.random.default_rng(1), []
        for targets, rank in ((list(shapes), 4), (["q_proj"], 33)):
            tensors = {}
            for target in targets:
                block = "mlp" if target == "down_proj" else "self_attn"
                stem = f"base_model.model.model.layers.0.{block}.{target}"
                n, k = shapes[target]
                tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, k)).astype(np.float32)
                tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((n, rank)).astype(np.float16)
            found.append(_framed(json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": rank}).encode(), save(tensors)))
            found.append(self._gguf({name: tensors[name].astype(np.float32) for name in tensors}))
        return found

    def _gguf(self, tensors: dict[str, Any]) -> bytes:
        import gguf

        from hob.engine.adapters import TARGETS

        path = self._folder / "seed.gguf"
        out = gguf.GGUFWriter(path, "llama")
        out.add_string("general.type", "adapter")
        out.add_string("adapter.type", "lora")
        out.add_float32("adapter.lora.alpha", 8.0)
        for name, values in tensors.items():
            parts = name.split(".")
            out.add_tensor(f"blk.0.{TARGETS[parts[-3]]}.weight.{parts[-2].lower()}", values)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path.read_bytes()

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """In the numbers of a GGUF header, in the settings or in the tensors' table."""
        if data[:4] == b"GGUF":
            return _change_gguf(data, rng, corpus)
        try:
            config, weights = _unframed(data)
            if rng.random() < 0.3:
                return _framed(json.dumps(change_tree(json.loads(config), rng)).encode(), weights)
            length = int.from_bytes(weights[:8], "little")
            table = json.loads(weights[8 : 8 + length])
        except (ValueError, struct.error, RecursionError):
            return change_bytes(data, rng, corpus)
        if rng.random() < 0.2:
            return _framed(config, change_bytes(weights, rng, corpus))
        text = json.dumps(change_tree(table, rng)).encode()
        return _framed(config, len(text).to_bytes(8, "little") + text + weights[8 + length :])

    def run(self, data: bytes) -> str:
        """As the engine process would."""
        if data[:4] == b"GGUF":
            path = self._folder / "adapter.gguf"
            path.write_bytes(data)
        else:
            path = self._folder / "adapter"
            path.mkdir(exist_ok=True)
            config, weights = _unframed(data)
            (path / CONFIG_FILE).write_bytes(config)
            (path / WEIGHTS_FILE).write_bytes(weights)
        self._engine.load_adapter(1, path)
        try:
            return step(self._engine, adapter=1)
        finally:
            self._engine.drop_adapter(1)


def _framed(config: bytes, weights: bytes) -> bytes:
    return len(config).to_bytes(4, "little") + config + weights


def _unframed(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:4], "little")
    return data[4 : 4 + length], data[4 + length :]


class TemplateTarget:
    """A chat template out of a model file, with and without tools."""

    def __init__(self, folder: Path) -> None:
        with open_gguf(write_tiny_gguf(folder / "t.gguf", 1, "F32", SHAPE)) as file:
            self._tokenizer = Tokenizer(file.metadata)

    def seeds(self) -> list[bytes]:
        """The shapes in use: plain, with a first system message, accumulating, with tools, with macros."""
        return [text.encode() for text in (CHAT_TEMPLATE, *TEXTS["templates"])]

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """Between words."""
        return change_text(data.decode("utf-8", "replace"), rng, TEXTS["template_pieces"], _texts(rng, corpus)).encode()

    def run(self, data: bytes) -> str:
        """As a chat would."""
        chat = ChatEncoder(data.decode("utf-8", "replace"), self._tokenizer)
        refusals = []
        for tools in (None, TOOLS):
            try:
                chat.encode(HELLO, tools)
            except InvalidRequest as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        return "rendered"


class GrammarTarget:
    """A Lark grammar, a regex or a JSON schema: compiled, then followed for some tokens. First line: which of these."""

    TOKENS = [bytes([i]) for i in range(256)] + [b"true", b'"name": ', b"\xe2\x82", b"\xac", b""]

    def __init__(self, folder: Path) -> None:
        self._grammars = Grammars(self.TOKENS, [len(self.TOKENS) - 1])
        self._masks = Masks(len(self.TOKENS))

    def seeds(self) -> list[bytes]:
        """The schemas of the tests, and some grammars and expressions."""
        schemas = json.loads((Path(__file__).parents[1] / "model" / "schemas.json").read_text())
        texts = ["schema\n" + json.dumps(one["schema"]) for one in schemas]
        return [text.encode() for text in [*texts, *TEXTS["grammars"]]]

    def change(self, data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        """A schema as a tree, else between words."""
        text = data.decode("utf-8", "replace")
        kind, _, body = text.partition("\n")
        if kind == "schema" and rng.random() < 0.6:
            try:
                return (kind + "\n" + json.dumps(change_tree(json.loads(body), rng))).encode()
            except (ValueError, RecursionError):
                pass
        others = [other.partition("\n")[2] for other in _texts(rng, corpus)]
        return (kind + "\n" + change_text(body, rng, TEXTS["grammar_pieces"], others)).encode()

    def run(self, data: bytes) -> str:
        """As a request that asks for it."""
        kind, _, body = data.decode("utf-8", "replace").partition("\n")
        fields: dict[str, Any] = {"grammar": body} if kind == "lark" else {"regex": body}
        if kind == "schema":
            try:
                schema = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest("not JSON") from error
            fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        grammar = grammar_of(CompletionRequest(model="", prompt="", **fields))
        if grammar is None:
            return "no grammar"
        matcher = self._grammars.compile(grammar).result()
        rng = random.Random(len(data))
        for _ in range(24):
            rows = self._masks.begin([matcher], [[]]).result()
            allowed = np.unpackbits(rows[0], count=len(self.TOKENS), bitorder="little").nonzero()[0]
            ended = self._masks.accept([matcher], [[int(rng.choice(allowed))]])[0]
            if ended is not None:
                if ended.error is not None:
                    raise ended.error
                return "complete"
        return "followed"


def _texts(rng: random.Random, corpus: Sequence[bytes]) -> list[str]:
    return [rng.choice(corpus).decode("utf-8", "replace")]


class PlantedTarget(GgufTarget):
    """The harness's own test: a file of at least 2^31 tensors ends the process, one of 2^31 keys raises, and one of
    version 255 never ends."""

    def run(self, data: bytes) -> str:
        """With three mistakes in it."""
        if len(data) >= 24 and data[:4] == b"GGUF":
            version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
            if num_tensors >= 1 << 31:
                _die()
            if num_keys >= 1 << 31:
                raise KeyError(num_keys)
            while version == 255:
                pass
        return super().run(data)


def _die() -> None:
    import faulthandler

    from hob.native import _core

    if hasattr(_core, "provoke"):
        _core.provoke("address")
    faulthandler._sigsegv()  # type: ignore[attr-defined]


TARGETS: dict[str, Callable[[Path], Target]] = {
    "gguf": GgufTarget,
    "packed": PackedTarget,
    "adapters": AdapterTarget,
    "grammars": GrammarTarget,
    "templates": TemplateTarget,
    "planted": PlantedTarget,
}
