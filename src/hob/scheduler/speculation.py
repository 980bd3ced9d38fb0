"""Guesses at what a stream says next, from what was said before; and when they pay. Pure: no clock, no engine.

    history   def add(a, b): ... def add            its last NGRAM tokens were there before: what followed is the draft
    step      [add] ( a , b                         1 + k rows of one sequence, and a draw after each
    verdict   ( a , c                               drawn tokens hold as long as the row before them was a true guess

Nothing is lost: a row's bits do not depend on its neighbours in the batch, and a draw's random number is a function of
seed, sample and position. So what holds is what steps of one row would have drawn, and what does not is as if it had
never been computed: its slots are written again, its blocks go back.

A row i of a draft is true with a chance of about p^i, where p is how often this sequence's guesses came true of late.
A token drawn early saves its share of a step of the streams; a row costs MARGIN times what the cost model says of one
more. So rows are added while p^i * token_s > row_s: none where guesses fail or many streams share a step, and then one
now and then, to see whether that has changed. Looking for repetitions in the text is prompt lookup (Saxena 2023).
"""

from __future__ import annotations

import math
from array import array

from hob.kvcache.compression import MIXED
from hob.request import Drafts, Kind, Sequence

NGRAM = 3
"""Tokens that must have been there before."""
MAX_DRAFT = 7
"""Most rows of a draft: with one more than eight in all a step takes markedly longer."""
MARGIN = 2.0
"""A drafted row counts as this many of the cost model's: it owes logits and a draw, which rows of prompts do not. It
does so in the step's work too. Else drafts fit into a pace that they break, and the model learns of dear rows."""
TRY_EVERY = 64
"""Steps after which one row is tried although that does not pay."""
KEEP = 0.9
"""Of what earlier drafts of the sequence count, after each one; of those of all sequences, its square root."""
PRIOR = 3.0
"""Guesses' worth of all sequences' experience that a new one begins with."""
_ITEM = array("i").itemsize


class Speculation:
    """How long a draft is worth its rows, over all sequences of a model."""

    def __init__(self) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._accepted, self._rejected = PRIOR / 2, PRIOR / 2

    def chance(self, drafts: Drafts) -> float:
        """That the sequence's next guess is true."""
        among_all = self._accepted / (self._accepted + self._rejected)
        return (drafts.accepted + PRIOR * among_all) / (drafts.accepted + drafts.rejected + PRIOR)

    def num_rows(self, drafts: Drafts, token_s: float, row_s: float) -> int:
        """How many rows to draft if that many can be guessed. row_s: seconds of one drafted row."""
        chance = self.chance(drafts)
        if chance * token_s <= row_s:
            drafts.num_passed += 1
            return int(drafts.num_passed % TRY_EVERY == 0)
        return min(int(math.log(row_s / token_s) / math.log(min(chance, 0.99))), MAX_DRAFT)

    def note(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """What became of a draft."""
        drafts, num_rejected = sequence.drafts, int(num_accepted < num_drafted)
        drafts.accepted = KEEP * drafts.accepted + num_accepted
        drafts.rejected = KEEP * drafts.rejected + num_rejected
        self._accepted = math.sqrt(KEEP) * self._accepted + num_accepted
        self._rejected = math.sqrt(KEEP) * self._rejected + num_rejected
        sequence.usage.num_drafted_tokens += num_drafted
        sequence.usage.num_accepted_tokens += num_accepted
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted


def may_draft(sequence: Sequence) -> bool:
    """Whether its output is drawn token by token, and nothing is measured of it at certain tokens."""
    return sequence.request.kind is Kind.GENERATE and sequence.request.kv_bits != MIXED


def look_up(sequence: Sequence, max_tokens: int) -> list[int]:
    """What followed the last NGRAM tokens when they were there last, again and again up to `max_tokens`; else nothing.

    A search over 4 bytes a token, kept from step to step: 8,000 tokens take some 10 us.
    """
    tokens, searched = sequence.token_ids, sequence.drafts.searched
    searched += array("i", tokens[len(searched) // _ITEM :]).tobytes()
    tail, end = bytes(searched[-NGRAM * _ITEM :]), len(searched) - _ITEM
    at = searched.rfind(tail, 0, end)
    while at > 0 and at % _ITEM:
        at = searched.rfind(tail, 0, at + len(tail) - 1)
    if at < 0 or at % _ITEM or len(tail) < NGRAM * _ITEM:
        return []
    start = at // _ITEM + NGRAM
    period = len(tokens) - start
    return [tokens[start + i % period] for i in range(max_tokens)]
