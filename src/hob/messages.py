"""What the API process and the engine process say to each other: msgpack frames over one Unix socket pair.

    API -> engine:  Submit, Cancel, Vocabulary, Publish, ForkContext, DropContext, LoadModel, UnloadModel, SetLease,
                    SetBudget, AskContexts, Shutdown
    engine -> API:  Ready, Report (one per step), Answer (to the five before Shutdown), Unloaded, LeasesEnded, Failed

A frame is a 4-byte little-endian length and that many bytes of msgpack. The engine reads what has come between two
steps and answers with one `Report` per step, so a token's path never waits for another Python thread.
"""

from __future__ import annotations

import struct

import msgspec

from hob.request import OutputError, Request, SequenceOutput, ServiceClass

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20


class Submit(msgspec.Struct, tag="submit"):
    """Take this request."""

    request: Request


class Cancel(msgspec.Struct, tag="cancel"):
    """The client left, or has all it wanted: free what the request holds before the next step."""

    request_id: str
    num_kept: int | None = None
    """A turn of a context has ended before the engine's end of it, at a stop string: how many of the sequence's tokens
    the history has. None: the turn was given up and leaves no trace."""


class Vocabulary(msgspec.Struct, tag="vocabulary"):
    """What tokens add to a text, sent once before the first request that has a grammar."""

    tokens: list[bytes]
    """By id. Empty: no text."""
    stop_token_ids: list[int]
    model: str = ""
    """Whose it is; empty: the default model's."""


class Publish(msgspec.Struct, tag="publish"):
    """The prompts of a model that all apps share from now on. All others are private."""

    model: str
    prompts: list[list[int]]


class ForkContext(msgspec.Struct, tag="fork_context"):
    """A context was copied: the copy refers to the same blocks on disk."""

    app: str
    parent_id: str
    child_id: str


class DropContext(msgspec.Struct, tag="drop_context"):
    """A context was deleted: free the blocks on disk that no other one refers to."""

    app: str
    context_id: str


class ModelSpec(msgspec.Struct, frozen=True):
    """A model that the engine process may load."""

    name: str
    packed_path: str
    """Packed file; empty for the fake engine."""
    text_bytes: int = 0
    """What tokenizer and template of it take in the API process: reserved with the rest."""


class Lease(msgspec.Struct, frozen=True):
    """What an app asks for a model beyond the moment of its requests."""

    rank: int = 0
    """Among idle models, a lower one is unloaded first."""
    is_pinned: bool = False
    """Not unloaded while the lease lasts."""
    keep_alive_s: float | None = None
    """Seconds after its last request that it stays. None: as the setting `keep_alive_s` says."""


class Need(msgspec.Struct, frozen=True):
    """How soon a model is wanted."""

    service_class: ServiceClass = ServiceClass.STANDARD
    """Of the request to come."""
    due_s: float | None = None
    """When its first token is due, on the machine's monotonic clock. None: it has no deadline."""


class LoadModel(msgspec.Struct, tag="load_model"):
    """Load this model unless it is. The answer comes when it is there or cannot be, or not in time."""

    call_id: int
    spec: ModelSpec
    need: Need = Need()


class UnloadModel(msgspec.Struct, tag="unload_model"):
    """Unload a model once its requests have ended."""

    call_id: int
    name: str


class SetLease(msgspec.Struct, tag="set_lease"):
    """An app's lease on a model: made, changed, or ended (None)."""

    call_id: int
    app: str
    name: str
    lease: Lease | None


class SetBudget(msgspec.Struct, tag="set_budget"):
    """What the service may take from now on."""

    call_id: int
    budget_bytes: int


class AskContexts(msgspec.Struct, tag="ask_contexts"):
    """What is on disk of these contexts."""

    call_id: int
    app: str
    context_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Finish the step and exit."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What the service tells about the loaded model."""

    name: str
    architecture: str
    num_parameters: int
    context_length: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    quantisation: str
    isa: str
    isa_reason: str
    num_threads: int
    adapters: list[str] = []
    """LoRA adapters that are loaded with it, NAME@DIGEST: a file that changes is another adapter."""
    kv_type: str = "f16"
    """Number format of keys and values."""


class Ready(msgspec.Struct, tag="ready"):
    """The model is loaded and the loop runs."""

    model: ModelInfo
    num_blocks: int
    block_size: int
    load_s: float


class ContextKv(msgspec.Struct, frozen=True):
    """What is on disk of a context."""

    num_bytes: int
    num_blocks: dict[int, int]
    """By bits of a value."""


class Answer(msgspec.Struct, tag="answer"):
    """To the call of that number: an error, or what was asked for."""

    call_id: int
    error: OutputError | None = None
    model: ModelInfo | None = None
    """The loaded model, to LoadModel."""
    room_bytes: int = 0
    """With ModelTooLarge: what a model may take."""
    contexts: dict[str, ContextKv] = {}
    """To AskContexts: those of which anything is there."""


class Unloaded(msgspec.Struct, tag="unloaded"):
    """A model's memory was given back: its text side may go too."""

    name: str


class LeasesEnded(msgspec.Struct, tag="leases_ended"):
    """These apps hold a model no more, though they did not end their leases."""

    name: str
    apps: list[str]


MAX_APPS = 256
"""Whose numbers are kept: a program of the owner's user may call itself anything. The oldest that are idle go."""


class AppStats(msgspec.Struct):
    """One app's present and past."""

    app: str
    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    compute_s: float = 0.0
    last_ttft_s: float = 0.0
    wait_s: float = 0.0
    """Seconds until the last of those that wait is expected to have its first token."""


class ModelStats(msgspec.Struct):
    """One model that is resident or on its way."""

    name: str
    state: str
    """'waiting' (for room), 'loading', 'ready', 'draining' (takes no new requests, to be unloaded when the last has
    ended), 'unloaded' (the default model: what the API process keeps of it is reserved still)."""
    num_bytes: int = 0
    """All that is reserved for it: weights, kv, scratch, buffers, text."""
    accounts: dict[str, int] = {}
    num_running: int = 0
    num_waiting: int = 0
    idle_s: float = 0.0
    """Since its last request ended. 0: one is there."""
    keep_alive_s: float | None = None
    """How long it stays idle. None: it is the default and does not leave by itself."""
    rank: int = 0
    is_pinned: bool = False
    leases: list[str] = []
    """Apps that hold one."""


class MemoryStats(msgspec.Struct):
    """The ledger."""

    budget_bytes: int = 0
    """What the owner grants."""
    reserved_bytes: int = 0
    overhead_bytes: int = 0
    """What the two processes take at most beside what is reserved: interpreters, libraries, sockets."""
    models: list[ModelStats] = []
    pressure: str = "none"
    """'none', 'some' or 'high': what the system says of its memory."""
    num_loads: int = 0
    num_unloads: int = 0
    num_refused: int = 0
    """Reservations that did not fit."""


class Stats(msgspec.Struct):
    """State of the engine process. Sent with a report at most ten times a second, and once when it falls idle."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    """Free blocks that hold a reusable prefix."""
    num_steps: int = 0
    num_rows: int = 0
    step_s: float = 0.0
    """Seconds spent in steps since start."""
    num_preemptions: int = 0
    num_abandoned: int = 0
    """Steps stopped for an urgent request, and the seconds that were lost with them."""
    abandoned_s: float = 0.0
    num_drafted_tokens: int = 0
    """Rows of guessed tokens, and of these the true ones, which saved a step each."""
    num_accepted_tokens: int = 0
    num_deadlines: int = 0
    """Requests with a deadline for the first token that have ended."""
    num_deadlines_missed: int = 0
    apps: list[AppStats] = []
    num_alarms: int = 0
    """Blocks, in memory or on disk, that were not what the index said: refused and computed again. Expected: 0."""
    num_blocks_written: int = 0
    """Blocks of contexts written to disk since start."""
    num_blocks_read: int = 0
    num_write_errors: int = 0
    """Turns whose blocks could not be written: they will be computed again."""
    disk_bytes: int = 0
    """KV of contexts on disk."""
    memory: MemoryStats = msgspec.field(default_factory=MemoryStats)


class Report(msgspec.Struct, tag="report"):
    """What one step brought."""

    outputs: list[SequenceOutput]
    stats: Stats | None = None


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot go on; it exits after this. `name` is a class of `errors`."""

    name: str
    message: str


ToModels = LoadModel | UnloadModel | SetLease | SetBudget | AskContexts
ToEngine = Submit | Cancel | Vocabulary | Publish | ForkContext | DropContext | ToModels | Shutdown
FromEngine = Ready | Report | Answer | Unloaded | LeasesEnded | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a frame, header included."""
    body = _encoder.encode(message)
    return FRAME_HEADER.pack(len(body)) + body


def decode_to_engine(body: bytes | bytearray | memoryview) -> ToEngine:
    """Body of a frame, as the engine reads it. Raises msgspec.DecodeError."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes | bytearray | memoryview) -> FromEngine:
    """Body of a frame, as the API reads it. Raises msgspec.DecodeError."""
    return _from_engine.decode(body)
