"""A collector for prometheus_client, which reads the counters only when it is scraped."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from outbox.errors import MissingExtra
from outbox.system import process
from outbox.system.fork_pause import Pause
from outbox.telemetry import sources
from outbox.telemetry.metrics import as_samples, cumulative, snapshot
from outbox.telemetry.sources import Labels, Samples, Value
from outbox.telemetry.table import METRICS, Metric

try:
    import prometheus_client
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
except ModuleNotFoundError as error:
    raise MissingExtra(
        "outbox.telemetry.PrometheusCollector needs prometheus-client, which isn't installed: "
        "pip install 'outbox-events[metrics]'"
    ) from error

__all__ = ["PrometheusCollector"]

logger = logging.getLogger("outbox.metrics")

_EVERY = 5.0
"""Seconds between two exports of several processes."""
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


class PrometheusCollector:
    """A collector of what this process has counted, for applications that have a registry.

    Counting costs nothing more with it: it reads when it is asked. Where the variable
    ``PROMETHEUS_MULTIPROC_DIR`` is set, as under gunicorn, prometheus_client asks no collector:
    there a thread adds what was counted to ordinary metrics, every 5 s and when the process exits.
    After a fork the child has a thread for itself. Thread-safe.
    """

    def register(self, registry: Any = None) -> PrometheusCollector:
        """Add it to a registry, and return it.

        Args:
            registry: the registry; the default is prometheus_client's own. With
                ``PROMETHEUS_MULTIPROC_DIR`` none is used.

        Raises:
            ValueError: the registry has a collector of outbox already.
        """
        if os.environ.get(_DIRECTORY):
            _exporter.start()
        else:
            (registry or prometheus_client.REGISTRY).register(self)
        return self

    def describe(self) -> Iterator[Any]:
        """Yield the metrics without values, so that a registry notices a second collector."""
        for name, metric in METRICS.items():
            yield _family(name, metric)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of this process."""
        for name, series in as_samples(snapshot()).items():
            metric = METRICS[name]
            family = _family(name, metric)
            for labels, value in series.items():
                if isinstance(value, tuple):
                    family.add_metric(labels, cumulative(metric, value), sum_value=value[0])
                else:
                    family.add_metric(labels, max(0.0, value))
            yield family


def _family(name: str, metric: Metric) -> Any:
    classes = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return classes[metric.kind](name, metric.text, labels=metric.labels)


class _Exporter:
    """Adds what was counted to metrics of prometheus_client, which it shares between processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[str, Any] = {}  # they write to files of the process that they are in
        self._exported: Samples = {}
        self._is_started = False

    def start(self) -> None:
        """Start the thread of this process, unless that has been done."""
        with self._lock:
            if self._is_started:
                return
            self._is_started = True
        process.at_exit(self.export)
        threading.Thread(target=self._run, name="outbox-metrics", daemon=True).start()

    def follow_fork(self) -> None:
        """Start from zero in a forked child, with a thread for it."""
        was_started, self._is_started = self._is_started, False
        self._lock = threading.Lock()
        self._exported = {}
        if was_started:
            with contextlib.suppress(RuntimeError):  # no more threads
                self.start()

    def export(self) -> None:
        """Add what was counted since the last export. Thread-safe."""
        with self._lock:
            for name, series in sources.read().items():
                metric = METRICS[name]
                before = self._exported.setdefault(name, {})
                for labels, value in series.items():
                    _add(self._child(name, metric, labels), metric, value, before.get(labels))
                    before[labels] = value

    def _run(self) -> None:
        pause = Pause()  # a fork waits: the child would inherit locks of prometheus_client
        while True:
            with pause:
                time.sleep(_EVERY)
            try:
                self.export()
            except Exception:
                logger.exception("could not export metrics")

    def _child(self, name: str, metric: Metric, labels: Labels) -> Any:
        parent = self._metrics.get(name)
        if parent is None:
            parent = self._metrics[name] = _metric(name, metric)
        return parent.labels(*labels) if metric.labels else parent


def _metric(name: str, metric: Metric) -> Any:
    """Return an ordinary metric in no registry: others read its files."""
    options: dict[str, Any] = {"labelnames": metric.labels, "registry": None}
    if metric.kind == "counter":
        return prometheus_client.Counter(name, metric.text, **options)
    if metric.kind == "histogram":
        return prometheus_client.Histogram(name, metric.text, buckets=metric.bounds, **options)
    options["multiprocess_mode"] = "livemax" if metric.is_maximum else "livesum"
    return prometheus_client.Gauge(name, metric.text, **options)


def _add(child: Any, metric: Metric, value: Value, before: Value | None) -> None:
    if isinstance(value, tuple):
        old = before if isinstance(before, tuple) else (0.0,) * len(value)
        total, *buckets = (new - was for new, was in zip(value, old, strict=True))
        # It has no method for more than one observation at a time.
        if total:
            child._sum.inc(total)
        for bucket, number in zip(child._buckets, buckets, strict=True):
            if number:
                bucket.inc(number)
    elif metric.kind == "gauge":
        child.set(max(0.0, value))
    else:
        was = 0.0 if before is None or isinstance(before, tuple) else before
        child.inc(max(0.0, value - was))


_exporter = _Exporter()
process.after_fork(_exporter.follow_fork)
