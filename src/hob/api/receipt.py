"""The receipt of a reply: what it took and what made it. One shape in every API, under the key `hob`.

tokens    seen (the prompt), cached (of these, not computed again), generated, cut (dropped because the caller let
          a prompt that is too long be cut; else such a prompt is an error)
seconds   queued, prefill, decode; of several choices the longest
model     name, quantisation, SHA-256 of the file (null while a file of no known hash is being hashed), adapter and
          its SHA-256
grammar   whether the output was held to one
class     interactive, standard or background
guessed   only if tokens were guessed ahead (scheduler/speculation.py): drafted, and of these accepted
waited    only if it had to wait: how many were ahead when it came, and in how many seconds a first token was expected
met       only if it asked for a deadline or a limit: whether it was kept
joules    of the processor, in proportion to the engine time of this reply; only where the machine measures it
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hob.request import ServiceClass

if TYPE_CHECKING:
    from hob.api.call import Call


def receipt(call: Call) -> dict[str, Any]:
    """Of a call that has ended, or is about to."""
    record, services = call.record, call.services
    totals, model = record.totals, services.backend.model
    adapter, _, adapter_digest = call.adapter.partition("@")
    decode_s = totals.decode_s
    if decode_s is None:  # it ended before the engine did, at a stop string
        decode_s = 0.0 if record.first_output_s is None else time.perf_counter() - record.first_output_s
    found: dict[str, Any] = {
        "tokens": {
            "seen": totals.num_prompt_tokens,
            "cached": totals.num_cached_tokens or 0,
            "generated": totals.num_output_tokens,
            "cut": totals.num_cut_tokens,
        },
        "seconds": {
            "queued": round(totals.queued_s, 6),
            "prefill": round(totals.prefill_s, 6),
            "decode": round(decode_s, 6),
        },
        "model": {
            "name": model.name,
            "quantisation": model.quantisation,
            "sha256": services.sha256_of(model.name),
            "adapter": adapter or None,
            "adapter_sha256": adapter_digest or None,
        },
        "grammar": record.has_grammar,
        "class": record.service_class or ServiceClass.STANDARD.name.lower(),
    }
    if (place := totals.place) is not None:
        found["waited"] = {"ahead": place.num_ahead, "expected": round(place.first_token_s, 6)}
    if totals.num_drafted_tokens:
        found["guessed"] = {"drafted": totals.num_drafted_tokens, "accepted": totals.num_accepted_tokens}
    met = {"ttft_deadline": totals.is_ttft_met, "tpot_limit": totals.is_tpot_met}
    if met := {name: value for name, value in met.items() if value is not None}:
        found["met"] = met
    joules = _joules(call)
    return found if joules is None else {**found, "joules": joules}


def _joules(call: Call) -> float | None:
    """The processor's energy since the call began, in proportion to the engine time that was this call's."""
    record, meter = call.record, call.services.meter
    if meter is None or record.joules_before is None or record.totals.compute_s is None:
        return None
    elapsed_s = time.perf_counter() - record.started_s
    return round((meter.joules() - record.joules_before) * min(record.totals.compute_s / elapsed_s, 1.0), 3)
