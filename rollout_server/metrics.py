"""Prometheus metrics: counters of the HTTP layer, and gauges read from the store's status when somebody asks.

The names are stable; docs/operating.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from atroposlib.wire.models import Status
from rollout_server.http.limits import InflightBytes

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one application, in a registry of their own.

    Args:
        inflight: the bytes of request bodies in memory.
    """

    def __init__(self, inflight: InflightBytes) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._status = StatusCollector()
        self._registry.register(self._status)
        self.requests = Counter(
            "atropos_server_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self.request_seconds = Histogram(
            "atropos_server_request_seconds",
            "Seconds from the headers of a request to the end of its answer; long-polls wait on purpose.",
            ("method", "route"),
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self.received_bytes = Counter(
            "atropos_server_received_bytes", "Body bytes received, as sent.", ("route",), registry=self._registry
        )
        self.sent_bytes = Counter(
            "atropos_server_sent_bytes", "Body bytes of answers.", ("route",), registry=self._registry
        )
        in_flight = Gauge("atropos_server_inflight_bytes", "Request bodies in memory.", registry=self._registry)
        in_flight.set_function(lambda: inflight.used)
        self.requests_in_flight = Gauge(
            "atropos_server_requests_in_flight", "Requests being answered.", registry=self._registry
        )

    def observe(
        self, method: str, route: str, status: int, *, seconds: float, received_bytes: int, sent_bytes: int
    ) -> None:
        """Count one answered request."""
        self.requests.labels(method, route, str(status)).inc()
        self.request_seconds.labels(method, route).observe(seconds)
        self.received_bytes.labels(route).inc(received_bytes)
        self.sent_bytes.labels(route).inc(sent_bytes)

    def render(self, status: Status) -> bytes:
        """The text exposition with the store as it stands now."""
        self._status.status = status
        return generate_latest(self._registry)


class StatusCollector(Collector):
    """Turns a Status into metric families."""

    def __init__(self) -> None:
        self.status = Status()

    def collect(self) -> Iterator[Metric]:
        """Yield what the last status says."""
        yield from _totals(self.status)
        yield from _gauges(self.status)
        yield from _environments(self.status)


def _totals(status: Status) -> Iterator[Metric]:
    groups = CounterMetricFamily(
        "atropos_server_groups", "Groups of this run, by what became of them.", labels=["status"]
    )
    groups.add_metric(["accepted"], status.groups_accepted)
    groups.add_metric(["duplicate"], status.groups_duplicate)
    groups.add_metric(["retired"], sum(status.groups_retired.values()))
    yield groups
    retired = CounterMetricFamily("atropos_server_groups_retired", "Groups put away unused.", labels=["reason"])
    for reason, count in status.groups_retired.items():
        retired.add_metric([reason], count)
    yield retired
    returned = CounterMetricFamily("atropos_server_tickets_returned", "Tickets given back unused.", labels=["reason"])
    for reason, count in status.tickets_returned.items():
        returned.add_metric([reason], count)
    yield returned


def _gauges(status: Status) -> Iterator[Metric]:
    values: dict[str, tuple[str, float | None]] = {
        "step": ("Steps that a trainer has used.", status.step),
        "steps_formed": ("Batches formed, those that the trainer holds included.", status.formed_steps),
        "steps_total": ("Steps of the run.", status.num_steps),
        "committed_step": ("Steps whose weights are safe in a checkpoint.", status.committed_step),
        "policy_version": ("Version of the inference servers; -1 before the first.", status.policy_version),
        "max_staleness": ("Staleness bound of the run, in versions.", status.max_staleness),
        "batch_size": ("Sequences of one step.", status.batch_size),
        "queue_groups": ("Groups that wait for the trainer.", status.queued_groups),
        "queue_sequences": ("Sequences that wait for the trainer.", status.queued_sequences),
        "queue_bytes": ("Payload that waits for the trainer.", status.queued_bytes),
        "tickets_outstanding": ("Groups in flight.", status.tickets_outstanding),
        "admitted_sequences": ("Sequences admitted so far.", status.admitted_sequences),
        "capacity_sequences": ("Sequences that the staleness bound admits now.", status.capacity_sequences),
        "trainer_last_seen_seconds": ("Seconds since the trainer's last call.", status.trainer_last_seen_s),
    }
    for name, (text, value) in values.items():
        family = GaugeMetricFamily(f"atropos_server_{name}", text)
        if value is not None:
            family.add_metric([], value)
        yield family


def _environments(status: Status) -> Iterator[Metric]:
    last_seen = GaugeMetricFamily(
        "atropos_server_env_last_seen_seconds", "Seconds since an environment's last call.", labels=["env"]
    )
    accepted = CounterMetricFamily(
        "atropos_server_env_groups_accepted", "Groups accepted from an environment.", labels=["env"]
    )
    tickets = GaugeMetricFamily("atropos_server_env_tickets", "Groups in flight of an environment.", labels=["env"])
    for env in {env.name: env for env in status.envs}.values():
        last_seen.add_metric([env.name], env.last_seen_s)
        accepted.add_metric([env.name], env.groups_accepted)
        tickets.add_metric([env.name], env.tickets)
    yield from (last_seen, accepted, tickets)
