"""What the server counts, for Prometheus; a registry of its own, so that two servers of one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from danlu.decode import Batcher

TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Meters:
    """Requests by path and status, seconds, tokens, what runs and waits."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        r = self.registry
        self.requests = Counter("danlu_requests", "Requests answered", ["path", "status"], registry=r)
        self.seconds = Histogram("danlu_request_seconds", "Time of a request, its body read", ["path"], buckets=SECONDS,
                                 registry=r)
        self.first = Histogram("danlu_first_piece_seconds", "Time until the first text of an answer", buckets=SECONDS, registry=r)
        self.tokens = Counter("danlu_tokens", "Tokens read and written", ["kind"], registry=r)
        self.under_way = Gauge("danlu_requests_under_way", "Requests under way", registry=r)
        self.waiting = Gauge("danlu_rows_waiting", "Rows of tasks that wait", registry=r)
        self.batch = Histogram("danlu_batch_rows", "Rows of tasks computed together", buckets=ROWS, registry=r)
        self.cancelled = Counter("danlu_cancelled", "Requests whose client went away", registry=r)
        self.refused = Counter("danlu_refused", "Requests refused, by reason", ["reason"], registry=r)
        self.filtered = Counter("danlu_filtered", "Texts that a filter stopped", ["where", "filter"], registry=r)

    def watch(self, batcher: Batcher) -> None:
        """Show what a batcher does whenever somebody looks."""
        running = Gauge("danlu_texts_running", "Texts that are continued", registry=self.registry)
        waiting = Gauge("danlu_texts_waiting", "Texts that wait to be continued", registry=self.registry)
        running.set_function(lambda: batcher.counts().running)
        waiting.set_function(lambda: batcher.counts().waiting)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
