"""A Backend over scripted outputs and a byte-level tokenizer: what the API is tested against without an engine.

Token ids 0 to 255 are bytes, 256 ends a reply, 257 and up are the words in WORDS.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import Any

from hob.errors import HobError
from hob.messages import MemoryStats, ModelInfo, Stats
from hob.request import FinishReason, Kind, OutputError, Request, Sampled, SequenceOutput, Top, Usage
from hob.service.outputs import Outputs

STOP_ID = 256
WORDS = ["Hello", " world", " ST", "OP", " and", " more"]
VOCAB_SIZE = 257 + len(WORDS)
HIDDEN = [3.0, 4.0, 0.0]
MODEL = ModelInfo("scripted", "fake", 1, 512, VOCAB_SIZE, 3, 1, 8, 0, "Q4_1", "portable", "scripted", 1)


class ByteTokenizer:
    """Bytes, and a few words so that tokens have several characters."""

    stop_token_ids = (STOP_ID,)

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Bytes only, so lengths are easy to say."""
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text."""
        if token_id < 256:
            return bytes([token_id])
        return b"" if token_id == STOP_ID else WORDS[token_id - 257].encode()

    def token_text(self, token_id: int) -> str:
        """As a vocabulary would write it."""
        return "<stop>" if token_id == STOP_ID else repr(self.token_bytes(token_id))


def tokens_of(text: str) -> list[int]:
    """Ids of a text, longest words first."""
    ids: list[int] = []
    while text:
        for i, word in enumerate(WORDS):
            if text.startswith(word):
                ids.append(257 + i)
                text = text[len(word) :]
                break
        else:
            ids += text[0].encode()
            text = text[1:]
    return ids


class PlainChat:
    """'role: content' lines and 'assistant:'."""

    def encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of the conversation."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return list(("".join(lines) + "assistant:").encode())


def score_of(token_id: int) -> float:
    """The log-probability the scripted model gives a token, wherever it stands."""
    return -(token_id % 16 + 1) / 8


def tops_of(token_id: int, count: int) -> list[Top]:
    """The most likely tokens in its place."""
    return [(ord("a") + i, -0.25 * (i + 1)) for i in range(count)]


class ScriptedBackend:
    """Answers each request with what `script` says, one token at a time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget requests, scripts and faults."""
        self.script: Callable[[Request, int], list[int]] = lambda request, index: tokens_of("Hello world")
        self.delay_s = 0.0
        self.requests: list[Request] = []
        self.refuse: HobError | None = None
        self.fail_after: int | None = None
        self.model_error: HobError | None = None
        self._feeds: dict[Outputs, asyncio.Task[None]] = {}
        self.num_cancelled = 0
        self.num_cached = 0
        self.memory = MemoryStats()

    @property
    def num_open(self) -> int:
        """Requests in flight."""
        return len(self._feeds)

    @property
    def model(self) -> ModelInfo:
        """The scripted model."""
        if self.model_error is not None:
            raise self.model_error
        return MODEL

    @property
    def stats(self) -> Stats:
        """Made up."""
        return Stats(num_running=self.num_open, num_blocks=64, memory=self.memory)

    def submit(self, request: Request) -> Outputs:
        """See Backend."""
        return Outputs(request, self._begin, self._end)

    async def _begin(self, outputs: Outputs) -> None:
        request = outputs.request
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        script = self._generate(request) if request.kind is Kind.GENERATE else self._others(request)
        self._feeds[outputs] = asyncio.create_task(self._feed(outputs, script))

    def _end(self, outputs: Outputs, is_complete: bool) -> None:
        if feed := self._feeds.pop(outputs, None):
            feed.cancel()
            self.num_cancelled += not is_complete

    async def _feed(self, outputs: Outputs, script: list[SequenceOutput]) -> None:
        for i, output in enumerate(script):
            await asyncio.sleep(self.delay_s)
            if i == self.fail_after:
                error = OutputError("EngineUnavailable", "the engine process died", 1.0)
                outputs.put(SequenceOutput(outputs.request.request_id, error=error, finish_reason=FinishReason.ERROR))
                return
            outputs.put(output)

    def _generate(self, request: Request) -> list[SequenceOutput]:
        lanes = []
        params = request.sampling
        for index in range(request.num_samples):
            script = self.script(request, index)
            reason = FinishReason.STOP if len(script) <= params.max_tokens else FinishReason.LENGTH
            script = script[: params.max_tokens]
            lane = [self._output(request, index, token_id) for token_id in script]
            last = SequenceOutput(request.request_id, index) if reason is FinishReason.STOP or not lane else lane.pop()
            last.finish_reason = reason
            if reason is FinishReason.STOP and params.logprobs is not None:
                last.end = Sampled(STOP_ID, score_of(STOP_ID), tops_of(STOP_ID, params.logprobs))
            last.usage = Usage(len(request.token_ids), self.num_cached, len(script))
            lanes.append([*lane, last])
        longest = max(map(len, lanes))
        return [lane[i] for i in range(longest) for lane in lanes if i < len(lane)]

    def _output(self, request: Request, index: int, token_id: int) -> SequenceOutput:
        output = SequenceOutput(request.request_id, index, [token_id])
        count = request.sampling.logprobs
        if count is not None:
            output.logprobs = [score_of(token_id)]
            output.tops = [tops_of(token_id, count)]
        return output

    def _others(self, request: Request) -> list[SequenceOutput]:
        usage = Usage(len(request.token_ids), self.num_cached)
        end = {"finish_reason": FinishReason.STOP, "usage": usage}
        if request.kind is Kind.EMBED:
            return [SequenceOutput(request.request_id, embedding=array("f", HIDDEN).tobytes(), **end)]
        scored = request.continuations or [request.token_ids[1:]]
        outputs = []
        for index, token_ids in enumerate(scored):
            output = SequenceOutput(request.request_id, index, scores=[score_of(t) for t in token_ids], **end)
            if request.prompt_logprobs:
                output.score_tops = [tops_of(t, request.prompt_logprobs) for t in token_ids]
            outputs.append(output)
        return outputs
