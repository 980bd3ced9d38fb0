"""Request bodies: one msgspec struct per endpoint. A field that is not named here is an error.

Fields of type `Any` are those that OpenAI clients may send and that Hob does not do: each is accepted at its neutral
value only, which NEUTRAL lists. msgspec rather than pydantic, because it validates a chat body in microseconds.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all request bodies."""


class ContentPart(Body, kw_only=True):
    """One part of a message. Only text is understood; the others are named so that the refusal can say so."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class CalledFunction(Body, kw_only=True):
    """What a call says: a function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body, kw_only=True):
    """A call that the model made in an earlier turn."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None

    @classmethod
    def of(cls, call_id: str, name: str, arguments: str) -> ToolCall:
        """From its parts."""
        return cls(id=call_id, function=CalledFunction(name=name, arguments=arguments))


class Function(Body, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, kw_only=True):
    """A tool that the model may use."""

    function: Function
    type: Literal["function"] = "function"


class Message(Body, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None


class StreamOptions(Body, kw_only=True):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body, kw_only=True):
    """What chat and completion requests share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    response_format: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    allow_cut: bool | None = None
    """Let a prompt that is too long lose its oldest part; else it is an error."""
    service_class: str | None = None
    ttft_deadline_ms: float | None = None
    """The first token is wanted within this time; refused at once if it cannot be had."""
    tpot_limit_ms: float | None = None
    """Most time per token after the first, on average."""
    user: str | None = None


class ChatRequest(Sampling, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Any = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None
    web_search_options: Any = None
    prompt_cache_retention: Any = None


class CompletionRequest(Sampling, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[Any]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None


class EmbeddingRequest(Body, kw_only=True):
    """Body of /v1/embeddings."""

    model: str
    input: str | list[Any]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] | None = None
    allow_cut: bool | None = None
    service_class: str | None = None
    user: str | None = None


class ClassifyRequest(Body, kw_only=True):
    """Body of /hob/v1/classify: exactly one of text, messages and prompt."""

    model: str = ""
    text: str | list[str] | None = None
    messages: list[Message] | None = None
    prompt: str | list[str] | None = None
    labels: list[str] | None = None
    continuations: list[str] | None = None
    instruction: str | None = None
    normalise: Literal["sum", "mean"] = "sum"
    calibrate: bool = False
    content_free: list[str] | None = None
    abstain_below: float | None = None
    service_class: str | None = None


class ScoreRequest(Body, kw_only=True):
    """Body of /hob/v1/score: one of prompt and messages, and what may follow it."""

    model: str = ""
    prompt: str | list[Any] | None = None
    """A text, or token ids."""
    messages: list[Message] | None = None
    continuations: list[Any] | None = None
    """Texts, or lists of token ids. None: the prompt's own tokens are scored."""
    top_logprobs: int | None = None
    service_class: str | None = None


class TokenizeRequest(Body, kw_only=True):
    """Body of /hob/v1/tokenize: exactly one of text, messages and tokens (the last: back to text)."""

    model: str = ""
    text: str | None = None
    messages: list[Message] | None = None
    tokens: list[int] | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "prompt_cache_retention": (),
    "suffix": ("",),
    "refusal": ("",),
    "annotations": ([],),
}
"""Values, beside null, at which a field that Hob does not do is accepted: there it asks for nothing."""
