"""What this process has counted, sums over processes, and the text that Prometheus reads.

A snapshot is plain data, so that a worker can send it to its parent as JSON: for each metric a list
of pairs, the values of its labels and its value. Its numbers are absolute: a snapshot that is lost
does no harm.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from outbox.system.version import installed_version
from outbox.telemetry import sources
from outbox.telemetry.sources import Samples, Value
from outbox.telemetry.table import METRICS, Metric

__all__ = [
    "CONTENT_TYPE",
    "METRICS",
    "Snapshot",
    "as_samples",
    "as_snapshot",
    "cumulative",
    "merge",
    "render",
    "snapshot",
    "version",
]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of what ``render()`` returns."""

Snapshot: TypeAlias = "dict[str, list[list[Any]]]"
"""By the name of a metric, pairs of labels (a list of strings) and value.

The value is a number; of a histogram it is a list: the sum, then the count of each bucket.
"""


def snapshot() -> Snapshot:
    """Return all that this process has counted since it began or was forked. Thread-safe."""
    samples = sources.read()
    samples["outbox_build_info"] = {(version(),): 1}
    return as_snapshot(samples)


@functools.cache
def version() -> str:
    """Return the version of outbox, which it takes milliseconds to look up."""
    return installed_version()


def merge(base: Mapping[str, Any], snapshots: Iterable[Mapping[str, Any]]) -> Snapshot:
    """Return the sum of the snapshots of several processes.

    What ended processes have counted is the base, so that sums never fall: add the last snapshot of
    a process to it with ``merge(base, [last])``. Of the base only counters and histograms count.

    Args:
        base: the sum of the snapshots of ended processes; empty at first.
        snapshots: the latest snapshot of each running process. What isn't one is ignored.
    """
    samples: Samples = {}
    counted = {
        name: series
        for name, series in base.items()
        if name in METRICS and METRICS[name].kind != "gauge"
    }
    sources.add(samples, as_samples(counted))
    for each in snapshots:
        sources.add(samples, as_samples(each))
    return as_snapshot(samples)


def render(snapshot: Mapping[str, Any]) -> str:
    """Return a snapshot in Prometheus' text format, version 0.0.4.

    An age or another value below 0, which a clock that was set back has caused, is 0.
    """
    samples = as_samples(snapshot)
    lines: list[str] = []
    for name, metric in METRICS.items():
        series = samples.get(name)
        if not series:
            continue
        lines.append(f"# HELP {name} {_escaped_help(metric.text)}")
        lines.append(f"# TYPE {name} {metric.kind}")
        for labels, value in series.items():
            pairs = _pairs(metric.labels, labels)
            if isinstance(value, tuple):
                lines += _histogram(name, metric, pairs, value)
            else:
                lines.append(f"{name}{_braced(pairs)} {_number(value)}")
    return "\n".join(lines) + "\n" if lines else ""


def as_samples(snapshot: Mapping[str, Any]) -> Samples:
    """Return a snapshot, which may come from another process, as samples; leave out what isn't."""
    samples: Samples = {}
    for name, metric in METRICS.items():
        pairs = snapshot.get(name)
        if not isinstance(pairs, list):
            continue
        series = samples[name] = {}
        for pair in pairs:
            try:
                labels, value = pair
                key = tuple(map(str, labels))
                number: Value = tuple(map(float, value)) if metric.bounds else float(value)
            except (TypeError, ValueError):
                continue
            if len(key) != len(metric.labels):
                continue
            if isinstance(number, tuple) and len(number) != len(metric.bounds) + 2:
                continue
            series[key] = number
    return samples


def as_snapshot(samples: Samples) -> Snapshot:
    """Return samples as plain data."""
    return {
        name: [
            [list(labels), list(value) if isinstance(value, tuple) else value]
            for labels, value in series.items()
        ]
        for name, series in samples.items()
    }


def _histogram(name: str, metric: Metric, pairs: list[str], value: tuple[float, ...]) -> list[str]:
    buckets = cumulative(metric, value)
    lines = [
        f"{name}_bucket{_braced([*pairs, _pair('le', bound)])} {_number(count)}"
        for bound, count in buckets
    ]
    lines.append(f"{name}_sum{_braced(pairs)} {_number(value[0])}")
    # From the same copy as the buckets: a count that is kept apart could differ from their sum.
    lines.append(f"{name}_count{_braced(pairs)} {_number(buckets[-1][1])}")
    return lines


def cumulative(metric: Metric, value: tuple[float, ...]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram as Prometheus has them: bounds as text, and counts up to.

    Args:
        metric: the metric.
        value: the sum, then the count of each bucket alone.
    """
    counts = itertools.accumulate(value[1:])
    return list(zip((*map(str, metric.bounds), "+Inf"), counts, strict=True))


def _pairs(names: tuple[str, ...], values: tuple[str, ...]) -> list[str]:
    return [_pair(name, value) for name, value in zip(names, values, strict=True)]


def _pair(name: str, value: str) -> str:
    return f'{name}="{_escaped(value)}"'


def _braced(pairs: list[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: str) -> str:
    plain = value.encode("utf-8", "replace").decode()  # lone surrogates can't be sent
    return plain.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _escaped_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _number(value: float) -> str:
    number = max(0.0, float(value))
    return str(int(number)) if number.is_integer() else repr(number)
