"""Metrics of the service for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["route", "status", "outcome"]
        self._requests = Counter("blip2_requests", "Requests by how they ended", labels, registry=self.registry)
        self._seconds = Histogram(
            "blip2_request_seconds", "Duration of requests", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("blip2_requests_in_flight", "Requests that wait or run", registry=self.registry)
        self.tokens = Counter("blip2_generated_tokens", "Tokens that were generated", registry=self.registry)
        self.rows = Gauge("blip2_running_texts", "Texts that are being generated", registry=self.registry)
        self.batch = Histogram(
            "blip2_batch_size", "Texts, images or pairs per pass of a model", buckets=ROWS, registry=self.registry
        )

    def count_request(self, route: str, status: int, outcome: str, seconds: float) -> None:
        """Count a request that has ended.

        Args:
            route: the path of its endpoint.
            status: status of the response, or 0 if there was none.
            outcome: ``answered``, ``client_left``, ``deadline`` or ``error``.
            seconds: its duration.
        """
        self._requests.labels(route, str(status), outcome).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
