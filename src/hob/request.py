"""What is asked of a model and what comes back: plain data, shared by every layer.

    Request  --admission-->  Sequence (one per sample or continuation)  --steps-->  SequenceOutput ...

A `Request` is what one client asked for, already in token ids: the engine process knows no text. A `Sequence` is its
tokens as the scheduler and the engine see them. There is no prefill phase and no decode phase: each sequence has
`num_computed_tokens` (KV exists) and `num_tokens`, and a step computes some of the difference.

Three kinds of answers come from one shape:

    generate   tokens are sampled after the prompt (`num_samples` of them side by side)
    score      log-probabilities of given tokens: of the prompt itself (`prompt_logprobs`) and of each of
               `continuations` after the prompt, which is computed once and shared
    embed      hidden states of the prompt after some layers, each pooled over some of its tokens
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from hob.errors import HobError
    from hob.pooling import Pooled


class ServiceClass(enum.IntEnum):
    """How urgent a request is. Lower runs first."""

    INTERACTIVE = 0
    STANDARD = 1
    BACKGROUND = 2


class Kind(enum.StrEnum):
    """What a request wants back."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token was sampled, or all that was asked for is computed."""
    LENGTH = "length"
    """`max_tokens` or the model's context is used up."""
    CANCELLED = "cancelled"
    """The client left or took the request back."""
    ERROR = "error"
    """The service failed; `SequenceOutput.error` says how."""


@dataclass(slots=True)
class SamplingParams:
    """How the next token is chosen. The neutral value of each field switches it off."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens. 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability is at least this. 1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. 0: none."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int = 0
    """The random number of a draw is a function of (seed, sample index, position) and of nothing else."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Sampling one of these ends the sequence; the token is not part of the output."""
    logprobs: int | None = None
    """None: none. k: the chosen token's log-probability and the k most likely tokens of each step."""


MAX_GRAMMAR_BYTES = 64 << 10
"""Longest grammar, schema or regular expression."""


@dataclass(slots=True)
class Grammar:
    """What the output must match. Enforced token by token, or the request is refused: never ignored."""

    lark: str
    """In Lark's notation as `llguidance` reads it, from the rule `start`."""
    param: str
    """The request's field that asked for it, for the refusal."""


@dataclass(slots=True)
class Pool:
    """How the states of a span of the prompt's tokens become one."""

    how: str = "mean"
    """'mean', 'max' of each value, or the 'last' token's."""
    start: int = 0
    end: int | None = None
    """One past the last token. None: the prompt's end."""

    def rows(self, num_tokens: int) -> tuple[int, int]:
        """First row that counts, and one past the last."""
        end = num_tokens if self.end is None else self.end
        return (end - 1 if self.how == "last" else self.start), end


@dataclass(slots=True)
class Request:
    """What one client asked for. Text is ids already; limits were checked at the edge and are checked again."""

    request_id: str
    app: str
    """Whose request this is, as identity names it: the key of fairness, of accounting and of the cache salt."""
    token_ids: list[int]
    """The prompt. Never empty."""
    kind: Kind = Kind.GENERATE
    model: str = ""
    """Catalogue name of the model; empty for the default."""
    adapter: str = ""
    """One of the model's adapters, as `ModelInfo.adapters` has it: NAME@DIGEST. Empty: none."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    """How many sequences to generate from the prompt (OpenAI's `n`)."""
    continuations: list[list[int]] = field(default_factory=list)
    """Score: token ids that follow the prompt, each on its own."""
    prompt_logprobs: int | None = None
    """None: none. k: log-probability of each prompt token after the first, and the k most likely in its place."""
    pools: list[Pool] = field(default_factory=lambda: [Pool()])
    """Embed: one vector for each of these and each layer."""
    layers: list[int] = field(default_factory=list)
    """Embed: after which layers; 0 is the embedding, the model's number of layers the final norm. Ascending. Empty: the
    last alone. States before the last are scaled to a root mean square of 1, so that no token outweighs the others."""
    service_class: ServiceClass = ServiceClass.STANDARD
    weight: float = 1.0
    """The app's share of compute time among its class."""
    ttft_deadline_s: float | None = None
    """Seconds after arrival by which the first token is wanted. None: as soon as its class allows."""
    arrived_s: float | None = None
    """When it arrived, on the machine's monotonic clock, which all processes share. None: when the engine has it."""
    tpot_limit_s: float | None = None
    """Most seconds per output token after the first, on average. None: as its class allows."""
    context_id: str | None = None
    """The persistent context whose turn this is: its KV is kept on disk when the turn ends. None: none."""
    kv_bits: int = 16
    """Of a value on disk: 16, 8, 4 or 3 (kvcache/compression.py). With fewer than 16 it comes back changed."""
    grammar: Grammar | None = None
    """Generate: what each sample must match."""

    @property
    def kv_variant(self) -> str:
        """What beside its tokens and app its KV depends on: only requests of one variant share blocks."""
        return self.adapter if self.kv_bits == 16 else f"{self.adapter} {self.kv_bits}"


Top = tuple[int, float]
"""A token id and its log-probability."""


@dataclass(slots=True)
class Sampled:
    """One drawn token."""

    token_id: int
    logprob: float = 0.0
    """log softmax of the raw logits, before temperature and penalties. 0 unless the draw's `logprobs` are wanted."""
    tops: list[Top] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """What a sequence took: the receipt. Times are seconds."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache rather than computed."""
    num_restored_tokens: int = 0
    """Of those, read from disk."""
    num_output_tokens: int = 0
    queued_s: float = 0.0
    """From arrival at the engine to its first step."""
    prefill_s: float = 0.0
    """From its first step to its first token."""
    decode_s: float = 0.0
    """From its first token to its last."""
    compute_s: float = 0.0
    """Engine time attributed to it: its rows' share of each step it was in."""
    num_drafted_tokens: int = 0
    """Guessed and computed ahead, and of these the true ones, which saved a step each."""
    num_accepted_tokens: int = 0
    is_ttft_met: bool | None = None
    """Whether the first token came before its deadline. None: there was none."""
    is_tpot_met: bool | None = None
    """Whether the tokens after it came within their limit. None: there was none."""


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a request that has to wait stands."""

    num_ahead: int
    """Requests that wait and go before it."""
    first_token_s: float
    """Seconds to its first token, by what steps are known to take."""


@dataclass(slots=True)
class OutputError:
    """An error that crosses the process boundary: the class's name in `errors` and its message."""

    name: str
    message: str
    retry_after_s: float | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: HobError) -> OutputError:
        """What one of ours becomes; `errors.error_from_name` is the way back."""
        return cls(type(error).__name__, error.message, error.retry_after_s, error.param)


class SequenceOutput(msgspec.Struct, array_like=True):
    """What one step added to one sequence. The last one of a sequence carries `finish_reason` and `usage`.

    The first one carries `usage` too, as far as it is known then: a caller that leaves early still learns what was
    cached. A struct that travels without its field names: it is what each token costs on its way to the client.
    """

    request_id: str
    index: int = 0
    """Which sample (generate) or which continuation (score) of the request."""
    token_ids: list[int] = []
    """New tokens, usually one."""
    logprobs: list[float] = []
    """Of `token_ids`, if asked for."""
    tops: list[list[Top]] = []
    """For each of `token_ids`, the most likely tokens in its place, if asked for."""
    scores: list[float] = []
    """Score: at the end, log p of each scored token. Prompt: len(prompt) - 1 values; continuation: its length."""
    score_tops: list[list[Top]] = []
    """Score: for each of `scores`, the most likely tokens in its place, if asked for."""
    end: Sampled | None = None
    """The stop token that ended the sequence, which is none of its output, if log-probabilities are asked for."""
    embedding: bytes = b""
    """Embed: (pools, layers, hidden_size) float32, not normalised. A head may want thousands of values."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: OutputError | None = None
    place: Place | None = None
    """It waits: said once, at admission, in an output that brings nothing else."""

    @classmethod
    def failed(cls, request_id: str, error: HobError, index: int = 0) -> SequenceOutput:
        """The only output of a sequence that no scheduler has."""
        return cls(request_id, index, finish_reason=FinishReason.ERROR, error=OutputError.of(error))


@dataclass(slots=True)
class Density:
    """Attention that each block of a sequence got from the rows that were measured."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Measured rows that saw the block."""
    num_tokens: int = 0
    """Of the sequence, when it was last measured."""

    def add(self, mass: list[float], num_tokens: int) -> None:
        """One more row."""
        for _ in range(len(mass) - len(self.sums)):
            self.sums.append(0.0)
            self.counts.append(0)
        for i, value in enumerate(mass):
            self.sums[i] += value
            self.counts[i] += 1
        self.num_tokens = num_tokens

    def means(self) -> list[float]:
        """By block, as far as any was measured."""
        return [total / count for total, count in zip(self.sums, self.counts, strict=True)]


@dataclass(slots=True)
class Drafts:
    """How guesses at a sequence's next tokens fared: see scheduler/speculation.py."""

    searched: bytearray = field(default_factory=bytearray)
    """Its tokens as they are searched, as far as that was done."""
    accepted: float = 0.0
    """True guesses, and drafts that ended with a wrong one; older ones count less."""
    rejected: float = 0.0
    num_passed: int = 0
    """Steps in which a draft would not have paid."""


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one sample or continuation as the scheduler and the engine see them. Owned by the engine process.

    `token_ids[:num_computed_tokens]` have their KV in `block_table`; the rest wait to be computed. A sequence of which
    all but the last token is computed is what others call "decoding".
    """

    request: Request
    index: int
    token_ids: list[int]
    """Prompt, then continuation or output."""
    arrival_s: float
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    """Block ids; token i lives in slot i % 16 of block_table[i // 16]."""
    score_from: int | None = None
    """First token whose log-probability is wanted; it and all after it are scored. None: none."""
    is_loading: bool = False
    """Blocks of it are being read from disk: it holds them, but gets no rows yet."""
    was_preempted: bool = False
    num_reached: int = 0
    """Most tokens that were ever computed of it: those below are computed again only because memory was taken away."""
    is_kept: bool = False
    """It keeps its blocks to its end: see scheduler/placement.py."""
    is_left: bool = False
    """It was preempted and blocks of it are kept on disk."""
    leader: Sequence | None = None
    """The sibling that computes the shared prompt; this one waits for it."""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of its full blocks, as far as they were needed."""
    scores: list[float] = field(default_factory=list)
    score_tops: list[list[Top]] = field(default_factory=list)
    density: Density = field(default_factory=Density)
    """How much attention its blocks got, where that is measured."""
    drafts: Drafts = field(default_factory=Drafts)
    pooled: Pooled | None = None
    """Embed: what is gathered of the hidden states so far."""
    matcher: object | None = None
    """Where it stands in its grammar (`engine.grammar.Matcher`), if it has one. The scheduler only carries it."""
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    first_step_s: float | None = None
    first_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the request's prompt."""
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.request.token_ids) if self.request.kind is Kind.GENERATE else 0

    @property
    def num_needed_tokens(self) -> int:
        """Tokens whose KV or output is still needed or was: all, but the last of a scored sequence predicts nothing."""
        return max(self.num_tokens - 1, 1) if self.request.kind is Kind.SCORE else self.num_tokens

    @property
    def first_wanted_row(self) -> int:
        """First row whose output is wanted still. Rows before it may come from a cache: only their KV counts."""
        if self.request.kind is Kind.EMBED:
            first = min(pool.rows(self.num_tokens)[0] for pool in self.request.pools)
            return max(first, self.pooled.next_row if self.pooled else 0)
        if self.score_from is not None and self.score_from + len(self.scores) < self.num_scorable_tokens:
            return self.score_from + len(self.scores) - 1
        return self.num_tokens - 1

    @property
    def is_shallow(self) -> bool:
        """Whether states of named layers are all that is wanted. The layers above them may then be left out, so its
        blocks are of no use to others: they never enter the prefix cache."""
        return self.request.kind is Kind.EMBED and bool(self.request.layers)

    @property
    def num_scorable_tokens(self) -> int:
        """Scores are wanted of tokens [score_from, num_scorable_tokens): never of generated ones."""
        return self.num_prompt_tokens if self.request.kind is Kind.GENERATE else self.num_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None
