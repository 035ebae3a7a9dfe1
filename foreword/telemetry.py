"""What a server counts, for Prometheus. One registry a server, so that two in one process do not mix."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _EngineCollector:
    """The engine's own counts, asked for when somebody looks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, about, value in (
            ("waiting", "Requests that have not started.", stats.waiting),
            ("running", "Requests that have started: the size of the batch.", stats.running),
        ):
            yield GaugeMetricFamily(f"foreword_requests_{name}", about, value)
        for name, about, value in (
            ("decode_steps", "Forward passes that made a token for each running request.", stats.steps_total),
            ("prefill_tokens", "Prompt tokens read.", stats.prefill_tokens_total),
            ("generated_tokens", "Tokens made.", stats.generated_tokens_total),
            ("prefix_hits", "Requests whose prefix was on the device already.", stats.prefix_hits_total),
        ):
            yield CounterMetricFamily(f"foreword_{name}", about, value)
        loads = CounterMetricFamily("foreword_prefix_loads", "Prefixes brought to the device.", labels=["origin"])
        for origin, count in stats.prefix_loads_total.items():
            loads.add_metric([origin], count)
        yield loads
        held = GaugeMetricFamily("foreword_prefix_bytes", "Prefixes in memory.", labels=["place"])
        for place, count in stats.prefix_bytes.items():
            held.add_metric([place], count)
        yield held


class Metrics:
    """Counts requests and times; `text` shows them with the engine's."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))  # pyright: ignore[reportArgumentType]
        self.requests = Counter(
            "foreword_http_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "foreword_http_seconds",
            "From request to the response's end.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "foreword_first_token_seconds",
            "From request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.tokens = Counter("foreword_tokens", "Tokens of requests.", ["kind"], registry=self._registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
