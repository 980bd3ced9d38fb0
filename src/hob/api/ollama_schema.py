"""Request bodies of Ollama's API. As in schema.py, a field that is not named here is an error."""

from __future__ import annotations

from typing import Any, Literal

from hob.api.schema import Body, Tool


class Options(Body, kw_only=True):
    """How to sample. Those of type Any belong to the owner's settings, or are accepted where they ask for nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    num_ctx: int | None = None
    repeat_last_n: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    penalize_newline: Any = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    vocab_only: Any = None
    logits_all: Any = None
    embedding_only: Any = None


class Base(Body, kw_only=True):
    """What all calls of a model share."""

    model: str
    options: Options | None = None
    keep_alive: float | str | None = None


class CalledFunction(Body, kw_only=True):
    """A call that the model made."""

    name: str
    arguments: dict[str, Any] | None = None
    index: int | None = None


class MadeCall(Body, kw_only=True):
    """As Ollama wraps it."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class OllamaMessage(Body, kw_only=True):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Any = None
    thinking: Any = None


class ChatBody(Base, kw_only=True):
    """Body of /api/chat."""

    messages: list[OllamaMessage] | None = None
    tools: list[Tool] | None = None
    format: Any = None
    stream: bool | None = None
    think: Any = None
    logprobs: Any = None
    top_logprobs: Any = None


class GenerateBody(Base, kw_only=True):
    """Body of /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    format: Any = None
    stream: bool | None = None
    suffix: Any = None
    template: Any = None
    context: Any = None
    images: Any = None
    think: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    width: Any = None
    height: Any = None
    steps: Any = None


class EmbedBody(Base, kw_only=True):
    """Body of /api/embed."""

    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = None


class OldEmbedBody(Base, kw_only=True):
    """Body of /api/embeddings, the older form: one text."""

    prompt: str


class NameBody(Body, kw_only=True):
    """Body of /api/show and /api/pull. Clients say `model`, older ones `name`."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None


ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "images": ([],),
    "thinking": ("",),
    "think": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
    "repeat_last_n": (-1,),
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "penalize_newline": (True,),
    "num_keep": (),
    "num_batch": (),
    "num_gpu": (0,),
    "main_gpu": (0,),
    "num_thread": (0,),
    "numa": (False,),
    "low_vram": (False,),
    "f16_kv": (True,),
    "use_mmap": (True,),
    "use_mlock": (False,),
    "vocab_only": (False,),
    "logits_all": (False,),
    "embedding_only": (False,),
}
"""Values, beside null, at which a field that Hob does not do is accepted."""
