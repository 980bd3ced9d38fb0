"""What the page's figures are made of: samples, rates, sessions, JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging

from hob.api.call import Record
from hob.api.observe import Buckets, Observer
from hob.api.overview import _recent_compute, _series
from hob.api.sessions import LINK_S, SESSION_S, Sessions, cookie_of
from hob.cli.look import curve
from hob.errors import PermissionDenied, RateLimited
from hob.logs import JsonFormatter
from hob.messages import AppStats, Stats


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_link_opens_one_session_and_both_end() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    session = sessions.enter(link := sessions.link())
    assert session is not None
    assert sessions.enter(link) is None
    assert sessions.knows(cookie_of(session).split(";")[0])
    assert sessions.knows(f"other=1; hob_session={session}")
    for wrong in ("", "hob_session=", "hob_session=x", f"hob_sessions={session}", 'hob_session="', "\x00=;;=,"):
        assert not sessions.knows(wrong)
    late = sessions.link()
    clock.now = LINK_S
    assert sessions.enter(late) is None
    clock.now = SESSION_S
    assert not sessions.knows(f"hob_session={session}")


def test_samples_are_taken_while_there_is_something_to_see() -> None:
    async def story() -> Observer:
        observer = Observer(lambda: Stats(num_running=1))
        record = Record("1/a", "POST /v1/chat/completions")
        observer.begin(record)
        await asyncio.sleep(0)
        record.totals.num_output_tokens = 7
        record.note_output()
        observer.end(record, "/v1/chat/completions", 200, None)
        assert observer._sampler is not None
        observer._sampler.cancel()
        observer._take_sample()
        return observer

    observer = asyncio.run(story())
    (sample,) = observer.samples  # two within a second are one
    assert (sample.num_output_tokens, len(sample.ttfts_s), sample.num_running) == (7, 1, 1)
    assert observer.num_by_status == {("/v1/chat/completions", 200): 1}
    assert not observer.in_flight


def test_rates_and_shares_come_from_differences() -> None:
    observer = Observer(Stats)
    for compute_s in (1.0, 4.0):
        observer._stats_of = lambda compute_s=compute_s: Stats(apps=[AppStats("1/a", compute_s=compute_s)])  # type: ignore[misc]
        observer.num_output_tokens = int(100 * compute_s)
        observer._take_sample()
        observer.samples[0].time -= 2.0
    series = _series(observer)
    assert len(series["time"]) == 1
    assert 70 < series["output_tok_s"][0] < 300
    now = Stats(apps=[AppStats("1/a", compute_s=4.0), AppStats("1/b", compute_s=3.0)])
    assert _recent_compute(now, observer) == {"1/a": 3.0, "1/b": 3.0}


def test_refusals_are_kept_with_their_words_and_mistakes_are_not() -> None:
    observer = Observer(Stats)
    record = Record("1/a", "GET /x")
    observer.end(record, "none", 403, PermissionDenied("no"))
    observer.end(record, "none", 404, None)
    for _ in range(60):
        observer.end(record, "none", 429, RateLimited("later"))
    assert observer.num_refusals == 61
    assert len(observer.refusals) == 50
    assert observer.refusals[-1].message == "later"


def test_buckets_count_what_is_at_most_each_bound() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        buckets.add(value)
    assert (buckets.counts, buckets.total) == ([2, 1, 1], 12.0)


def test_a_log_line_as_json_has_the_request_s_fields() -> None:
    record = logging.LogRecord("hob.api", logging.INFO, "", 0, "said %s", ("ä",), None)
    record.fields = {"app": "1/a", "status": 200}
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "said ä"
    assert (line["level"], line["app"], line["status"]) == ("info", "1/a", 200)


def test_curve_of_the_terminal() -> None:
    assert curve([0, None, 4, 8]) == "▁ ▅█"
    assert curve([]) == ""
    assert len(curve([1.0] * 200)) == 60
