"""What a server tells Prometheus about its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .engine import Engine

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LATER = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """An observer of an engine, and the text that a scrape gets.

    `engine` gives the engine of the moment, None before the first request.
    """

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._first = Histogram(
            "mlxrewrite_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=FIRST,
            registry=self._registry,
        )
        self._later = Histogram(
            "mlxrewrite_time_per_output_token_seconds",
            "Between a token and the next one of the same request.",
            buckets=LATER,
            registry=self._registry,
        )
        self._ends: dict[str, int] = {}
        self._registry.register(self)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def later_tokens(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._later.observe(seconds / count)

    def finished(self, reason: str) -> None:
        self._ends[reason] = self._ends.get(reason, 0) + 1

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """What the engine knows, read when somebody asks."""
        ends = CounterMetricFamily(
            "mlxrewrite_requests_finished", "Requests by how they ended.", labels=["reason"]
        )
        engine = self._engine()
        for reason, count in sorted(self._ends.items()):
            ends.add_metric([reason], count)
        if engine is not None:
            ends.add_metric(["aborted"], engine.stats.aborted)
        yield ends
        if engine is None:
            return
        stats = engine.stats
        yield _gauge("requests_waiting", "Requests that wait for room.", engine.waiting)
        yield _gauge("requests_running", "Requests that have blocks.", engine.running)
        for name, text, value in (
            ("steps", "Forward passes.", stats.steps),
            ("rows", "Rows of all forward passes.", stats.rows),
            ("prompt_rows", "Rows that read prompts.", stats.prompt_rows),
            ("tokens", "Tokens generated.", stats.tokens),
            ("preemptions", "Requests that gave way and started again.", engine.preemptions),
            ("drafted_tokens", "Tokens guessed.", stats.drafted),
            ("accepted_tokens", "Guesses that were right.", stats.accepted),
            ("step_seconds", "Time in steps.", stats.seconds),
            ("device_wait_seconds", "Of that, waiting for the device.", stats.waited),
        ):
            yield CounterMetricFamily(f"mlxrewrite_{name}", text, value=value)
        if engine.store is None:
            return
        reuse = engine.store.stats
        yield CounterMetricFamily(
            "mlxrewrite_prefix_queried_tokens", "Tokens of admitted prompts.", value=reuse.queried
        )
        yield CounterMetricFamily(
            "mlxrewrite_prefix_reused_tokens", "Of those, found in blocks.", value=reuse.reused
        )
        rate = reuse.reused / reuse.queried if reuse.queried else 0.0
        yield _gauge("prefix_hit_rate", "Reused tokens over queried ones.", rate)
        blocks = GaugeMetricFamily(
            "mlxrewrite_blocks", "Blocks by group of layers and state.", labels=["group", "state"]
        )
        for retention, allocator in engine.store.cache.groups:
            if allocator is None:
                continue
            group = "full"
            if retention.window is not None:
                group = f"window_{retention.window}"
            elif retention.chunk is not None:
                group = f"chunk_{retention.chunk}"
            kept = allocator.num_kept
            blocks.add_metric([group, "held"], allocator.num_blocks - allocator.num_free)
            blocks.add_metric([group, "kept"], kept)
            blocks.add_metric([group, "free"], allocator.num_free - kept)
        yield blocks
        how = engine.quantization
        yield _gauge(
            "kv_bits", "Of a key or value; 0: in the model's type.", how.bits if how else 0
        )
        yield _gauge(
            "kv_bytes_per_token", "Of a position in all layers that page.", engine.position_bytes
        )
        yield _gauge("kv_held_bytes", "Of the blocks that requests hold.", engine.held_bytes)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mlxrewrite_{name}", text, value=value)
