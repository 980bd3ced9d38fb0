"""From the backend's tokens to text deltas per choice: characters made whole, stop strings found, log-probs aligned.

    SequenceOutput (ids) --ChoiceText--> Delta (text that may be shown, the tokens it covers, why it ended)

Knows nothing of HTTP or of any wire format.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from hob.api.services import TextCodec
from hob.api.stops import StopFinder
from hob.request import FinishReason, Place, Request, SequenceOutput, Top, Usage
from hob.service.backend import Backend


@dataclass(slots=True)
class TokenScore:
    """A generated token with its log-probability, as the caller sees it."""

    token_id: int
    logprob: float
    tops: list[Top]
    offset: int
    """Characters of the choice's text before it."""


@dataclass(slots=True)
class Delta:
    """What is new of one choice."""

    index: int
    text: str
    scores: list[TokenScore]
    """Of the tokens that begin in the text given so far, if log-probabilities were asked for."""
    finish_reason: FinishReason | None = None
    end: TokenScore | None = None
    """Of the stop token that ended the choice, if log-probabilities were asked for. It is no part of the text."""


@dataclass(slots=True)
class Totals:
    """Token counts of a request, over all choices."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    """None: not known, because no output came."""
    num_output_tokens: int = 0
    num_cut_tokens: int = 0
    """Of the prompt as it was sent, dropped because the caller allowed it."""
    queued_s: float = 0.0
    """Times are the longest over all sequences."""
    prefill_s: float = 0.0
    decode_s: float | None = None
    """None: no sequence ran to its end."""
    compute_s: float = 0.0
    """Engine time over all sequences."""
    num_drafted_tokens: int = 0
    """Guessed ahead, and of these the true ones, over all sequences that ran to their end."""
    num_accepted_tokens: int = 0
    place: Place | None = None
    """Where the request stood when it came, if it had to wait."""
    is_ttft_met: bool | None = None
    is_tpot_met: bool | None = None
    """Whether deadline and limit were kept, where there were any; of several sequences by the last to end."""

    def note(self, usage: Usage) -> None:
        """Count what a request's first sequence found in the prefix cache; its siblings share what it computed."""
        self.num_cached_tokens = (self.num_cached_tokens or 0) + usage.num_cached_tokens
        self._times(usage)

    def close(self, usage: Usage) -> None:
        """A sequence has ended."""
        self._times(usage)
        self.decode_s = max(self.decode_s or 0.0, usage.decode_s)
        self.compute_s += usage.compute_s
        self.num_drafted_tokens += usage.num_drafted_tokens
        self.num_accepted_tokens += usage.num_accepted_tokens
        self.is_tpot_met = usage.is_tpot_met

    def _times(self, usage: Usage) -> None:
        self.is_ttft_met = usage.is_ttft_met
        self.queued_s = max(self.queued_s, usage.queued_s)
        self.prefill_s = max(self.prefill_s, usage.prefill_s)


class ChoiceText:
    """One choice's tokens becoming text."""

    def __init__(self, index: int, tokenizer: TextCodec, stops: list[str], *, with_scores: bool) -> None:
        self.index = index
        self.is_finished = False
        self.token_ids: list[int] = []
        """All that came, the one in which a stop string ended included."""
        self._token_bytes = tokenizer.token_bytes
        self._half = b""
        """Bytes of a character that is not whole yet."""
        self._stops = StopFinder(stops)
        self._with_scores = with_scores
        self._num_decoded = 0
        self._num_shown = 0
        self._waiting: list[TokenScore] = []

    def push(self, output: SequenceOutput) -> Delta:
        """Take in one output. Must not be called after the choice is finished."""
        shown = ""
        for i, token_id in enumerate(output.token_ids):
            text = self._decode(self._token_bytes(token_id))
            self.token_ids.append(token_id)
            if self._with_scores:
                tops = output.tops[i] if output.tops else []
                self._waiting.append(TokenScore(token_id, output.logprobs[i], tops, self._num_decoded))
            self._num_decoded += len(text)
            shown += self._stops.push(text)
            if self._stops.is_found:
                return self._finish(shown, FinishReason.STOP)
        if output.finish_reason is None:
            self._num_shown += len(shown)
            return Delta(self.index, shown, self._release() if self._with_scores else [])
        # A character that the last token left unfinished shows as U+FFFD: its bytes are no text.
        shown += self._stops.push(self._decode(b"", is_end=True))
        if self._stops.is_found:
            return self._finish(shown, FinishReason.STOP)
        delta = self._finish(shown + self._stops.flush(), output.finish_reason)
        delta.scores += self._waiting
        if output.end is not None:
            delta.end = TokenScore(output.end.token_id, output.end.logprob, output.end.tops, self._num_shown)
        return delta

    def _decode(self, raw: bytes, is_end: bool = False) -> str:
        raw = self._half + raw
        text, num_used = utf_8_decode(raw, "replace", is_end)
        self._half = raw[num_used:]
        return text

    def _finish(self, shown: str, reason: FinishReason) -> Delta:
        self.is_finished = True
        self._num_shown += len(shown)
        return Delta(self.index, shown, self._release(), reason)

    def _release(self) -> list[TokenScore]:
        """Scores of the tokens that begin before the end of what is shown."""
        num = 0
        while num < len(self._waiting) and self._waiting[num].offset < self._num_shown:
            num += 1
        ready, self._waiting = self._waiting[:num], self._waiting[num:]
        return ready


class Generation:
    """One request becoming deltas: of its outputs one by one (`push`), or as they come (`deltas`).

    A choice that meets a stop string ends there; once all have ended the engine's request is cancelled.
    counts_prompt: False where another request of the same call has counted this prompt in `totals`.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextCodec,
        request: Request,
        stops: list[str],
        totals: Totals,
        *,
        counts_prompt: bool = True,
    ) -> None:
        with_scores = request.sampling.logprobs is not None
        self.choices = [ChoiceText(i, tokenizer, stops, with_scores=with_scores) for i in range(request.num_samples)]
        self.outputs = backend.submit(request)
        self.ends_with_engine = not stops
        """No choice ends before the engine says so."""
        self._totals = totals
        self._num_left = len(self.choices)
        self._is_noted = not counts_prompt
        if counts_prompt:
            totals.num_prompt_tokens += len(request.token_ids)

    def push(self, output: SequenceOutput) -> Delta | None:
        """Take in one output; give what can be shown of it. Adds to the totals."""
        choice = self.choices[output.index]
        if output.usage is not None and output.index == 0 and not self._is_noted:
            self._is_noted = True
            self._totals.place = self.outputs.place
            self._totals.note(output.usage)
        if output.finish_reason is not None and output.usage is not None:
            self._totals.close(output.usage)
        if choice.is_finished:
            return None
        before = len(choice.token_ids)
        delta = choice.push(output)
        self._totals.num_output_tokens += len(choice.token_ids) - before
        self._num_left -= choice.is_finished
        return delta if delta.text or delta.scores or delta.finish_reason is not None else None

    @property
    def is_finished(self) -> bool:
        """Whether all choices have ended."""
        return self._num_left == 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Deltas of all choices until each has ended."""
        async with aclosing(self.outputs):
            async for output in self.outputs:
                delta = self.push(output)
                if delta is not None:
                    yield delta
                if self._num_left == 0:
                    return
