"""/metrics in the text format of Prometheus. The library is imported at the first scrape: a service that nobody
scrapes does not carry it. Counts are kept by observe.py; here they only get names.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING

from starlette.responses import Response

from hob.api.call import Call
from hob.api.observe import Buckets
from hob.api.overview import check_owner
from hob.api.services import Services

if TYPE_CHECKING:
    from prometheus_client.core import Metric

APP_COUNTERS = {
    "num_requests": ("hob_app_requests", "Requests that reached the engine."),
    "num_prompt_tokens": ("hob_app_prompt_tokens", "Tokens of prompts."),
    "num_cached_tokens": ("hob_app_cached_tokens", "Of those, found in the prefix cache."),
    "num_output_tokens": ("hob_app_output_tokens", "Tokens generated."),
    "compute_s": ("hob_app_compute_seconds", "Engine time attributed to the app."),
}
ENGINE_COUNTERS = {
    "num_steps": ("hob_steps", "Forward passes."),
    "num_rows": ("hob_rows", "Tokens computed."),
    "step_s": ("hob_step_seconds", "Time spent in steps."),
    "num_drafted_tokens": ("hob_drafted_tokens", "Rows of tokens guessed ahead; they grow only while that pays."),
    "num_accepted_tokens": ("hob_accepted_tokens", "Of those, true guesses."),
    "num_preemptions": ("hob_preemptions", "Sequences that lost their blocks."),
    "num_alarms": ("hob_alarms", "Blocks that were not what the index said. Expected: 0."),
}
ENGINE_GAUGES = {
    "num_running": ("hob_running", "Sequences that hold blocks."),
    "num_waiting": ("hob_waiting", "Sequences in the queue."),
    "num_blocks": ("hob_kv_blocks", "KV blocks in the pool."),
    "num_free_blocks": ("hob_kv_free_blocks", "KV blocks that nobody holds."),
    "num_cached_blocks": ("hob_kv_cached_blocks", "Of those, blocks with a reusable prefix."),
    "disk_bytes": ("hob_context_disk_bytes", "KV of contexts on disk."),
}


async def metrics(call: Call) -> Response:
    """A scrape."""
    check_owner(call)
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(call.services))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _Collector:
    """What the library asks for metrics."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats, observer = self._services.backend.stats, self._services.observer
        yield GaugeMetricFamily("hob_in_flight", "Requests that have not ended.", value=len(observer.in_flight))
        requests = CounterMetricFamily("hob_requests", "Requests that ended.", labels=["endpoint", "status"])
        for (endpoint, status), count in sorted(observer.num_by_status.items()):
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        yield CounterMetricFamily("hob_refusals", "Requests refused.", value=observer.num_refusals)
        yield _histogram("hob_ttft_seconds", "From arrival to the first output.", observer.ttft)
        yield _histogram("hob_request_seconds", "From arrival to the end.", observer.duration)
        for attribute, (name, text) in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))
        for attribute, (name, text) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
        for attribute, (name, text) in APP_COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=["app"])
            for app in stats.apps:
                family.add_metric([app.app], getattr(app, attribute))
            yield family


def _histogram(name: str, text: str, buckets: Buckets) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    counts = buckets.counts or [0] * (len(buckets.bounds) + 1)
    cumulative, total = [], 0
    for bound, count in zip([*buckets.bounds, inf], counts, strict=True):
        total += count
        cumulative.append(("+Inf" if bound == inf else repr(bound), float(total)))
    return HistogramMetricFamily(name, text, buckets=cumulative, sum_value=buckets.total)
