"""Metrics: what processes have counted, its sums, and the text that Prometheus reads."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outbox import EventCollector, Publisher
from outbox.consumers import ACK
from outbox.consumers.message.tally import OUTCOMES, Tally
from outbox.messages.delivery import Delivery
from outbox.telemetry import metrics, sources
from outbox.telemetry.histogram import BOUNDS
from outbox.telemetry.sources import Samples
from outbox.telemetry.table import METRICS


class Owner:
    """Counts messages of queues."""

    def __init__(self, **messages: int) -> None:
        self.messages = messages
        counts = self.messages

        def read() -> Samples:
            return {"outbox_messages_total": {(q, "C", "acked"): n for q, n in counts.items()}}

        sources.register(self, read, lambda owner: {"outbox_handlers_late": {(): 1}})


@pytest.fixture(autouse=True)
def _nothing_counted() -> Iterator[None]:
    gc.collect()
    kept = list(sources._living), dict(sources._gone), dict(sources._known)
    sources._living.clear()
    sources._gone.clear()
    sources._known.clear()
    yield
    sources._living[:] = kept[0]
    sources._gone.clear()
    sources._gone.update(kept[1])
    sources._known.clear()
    sources._known.update(kept[2])


def of(snapshot: metrics.Snapshot, name: str) -> dict[tuple[str, ...], Any]:
    return {tuple(labels): value for labels, value in snapshot.get(name, [])}


def test_the_counts_of_several_objects_add_up() -> None:
    one, other = Owner(a=1, b=2), Owner(b=40)
    snapshot = metrics.snapshot()
    assert of(snapshot, "outbox_messages_total") == {
        ("a", "C", "acked"): 1,
        ("b", "C", "acked"): 42,
    }
    assert of(snapshot, "outbox_handlers_late") == {(): 2}
    del one, other


def test_what_an_object_has_counted_stays_when_it_is_gone() -> None:
    one = Owner(a=1)
    one.messages["a"] = 7
    assert of(metrics.snapshot(), "outbox_messages_total") == {("a", "C", "acked"): 7}
    del one
    for _ in range(2):
        snapshot = metrics.snapshot()
        assert of(snapshot, "outbox_messages_total") == {("a", "C", "acked"): 7}
        assert of(snapshot, "outbox_handlers_late") == {}


def test_a_forked_child_starts_from_zero() -> None:
    one = Owner(a=1)
    sources.count("outbox_events_total", ("stored",), 3)

    def child() -> int:
        counted = metrics.snapshot()
        counted.pop("outbox_build_info")
        again = Owner(a=5)
        mine = of(metrics.snapshot(), "outbox_messages_total")
        del again
        return int(bool(counted) or mine != {("a", "C", "acked"): 5})

    pid = os.fork()
    if not pid:
        code = 2
        try:
            code = child()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert of(metrics.snapshot(), "outbox_events_total") == {("stored",): 3}
    del one


def test_a_snapshot_survives_json() -> None:
    owner = Owner(a=1)
    snapshot = metrics.snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert metrics.render(json.loads(json.dumps(snapshot))) == metrics.render(snapshot)
    del owner


def acked(number: int, queue: str = "q") -> dict[str, Any]:
    return {"outbox_messages_total": [[[queue, "C", "acked"], number]]}


def test_a_parents_sums_never_fall() -> None:
    base: metrics.Snapshot = {}
    seen = []
    for life in range(4):  # a worker counts, ends, and is replaced by one that begins at zero
        for number in (1, 5, 9):
            latest = {**acked(number), "outbox_handlers_late": [[[], 1]]}
            total = metrics.merge(base, [latest, acked(100)])
            seen.append(of(total, "outbox_messages_total")["q", "C", "acked"])
        base = metrics.merge(base, [latest])
        assert of(base, "outbox_messages_total") == {("q", "C", "acked"): 9 * (life + 1)}
    assert seen == sorted(seen)
    # Gauges of the ended ones don't count.
    assert of(metrics.merge(base, []), "outbox_handlers_late") == {}


def test_histograms_add_up_by_bucket() -> None:
    value = [1.5, *range(len(BOUNDS) + 1)]
    one = {"outbox_message_wait_seconds": [[["q"], value]]}
    total = metrics.merge({}, [one, one])
    assert of(total, "outbox_message_wait_seconds") == {("q",): [2 * each for each in value]}


def test_the_highest_of_several_ages_counts() -> None:
    ages = [{"outbox_oldest_kept_age_seconds": [[[], age]]} for age in (3.0, 8.0, 1.0)]
    assert of(metrics.merge({}, ages), "outbox_oldest_kept_age_seconds") == {(): 8.0}


@pytest.mark.parametrize(
    "nonsense",
    [
        {"outbox_messages_total": "x"},
        {"outbox_messages_total": [[["q"], 1]]},
        {"outbox_messages_total": [[["q", "c", "acked"], "x"], 7, [1]]},
        {"outbox_message_wait_seconds": [[["q"], [1.0, 2]]]},
        {"unknown": [[[], 1]]},
    ],
)
def test_what_is_no_snapshot_is_left_out(nonsense: dict[str, Any]) -> None:
    assert metrics.render(metrics.merge({}, [nonsense])) == ""


def test_the_text_is_what_prometheus_reads() -> None:
    queue = 'odd "name"\nwith \\ and é'
    snapshot: dict[str, Any] = {
        **acked(3, queue),
        "outbox_oldest_kept_age_seconds": [[[], -5.0]],
        "outbox_message_wait_seconds": [[[queue], [2.5, 1, *[0] * (len(BOUNDS) - 1), 4]]],
    }
    families = {family.name: family for family in text_string_to_metric_families(
        metrics.render(snapshot)
    )}  # fmt: skip
    [sample] = families["outbox_messages"].samples
    assert (sample.labels["queue"], sample.value) == (queue, 3)
    [age] = families["outbox_oldest_kept_age_seconds"].samples
    assert age.value == 0  # a clock was set back
    waits = {
        (sample.name.removeprefix("outbox_message_wait_seconds"), sample.labels.get("le")): (
            sample.value
        )
        for sample in families["outbox_message_wait_seconds"].samples
    }
    assert waits["_bucket", "0.005"] == waits["_bucket", "300.0"] == 1
    assert waits["_bucket", "+Inf"] == waits["_count", None] == 5
    assert waits["_sum", None] == 2.5


def test_a_metric_has_a_bounded_number_of_series() -> None:
    owners = [Owner(**{f"queue{n}": 1}) for n in range(2500)]
    series = of(metrics.snapshot(), "outbox_messages_total")
    assert 900 < len(series) <= sources.MOST_SERIES
    assert sum(series.values()) == 2500
    assert series["other", "other", "acked"] > 1000
    text = metrics.render(metrics.snapshot())
    assert len(re.findall("^outbox_messages_total", text, re.M)) == len(series)
    # A series that was there stays, whatever comes and goes.
    del owners[:500]
    again = of(metrics.snapshot(), "outbox_messages_total")
    assert again == series


def test_a_publisher_counts_what_becomes_of_events() -> None:
    with Publisher("memory://") as publisher:
        collector = EventCollector(publisher=publisher)
        for number in range(3):
            collector.enqueue_event(number, "x")
        collector.publish()
        collector.enqueue_event(4, "x")
        collector.clear_events()
        snapshot = metrics.snapshot()
    fates = of(snapshot, "outbox_events_total")
    assert (fates["published",], fates["cleared",], fates["kept",]) == (3, 1, 0)
    assert of(snapshot, "outbox_events_collected_total") == {(): 4}
    assert sum(of(snapshot, "outbox_publish_duration_seconds")[()][1:]) == 1
    assert of(snapshot, "outbox_connected") == {("publisher",): 1}


def test_all_that_is_counted_is_in_the_table() -> None:
    tally = Tally({"q": "C"})
    tally.of_thread().ended(Delivery("q", 1, 1, False, "", "q", b"{}"), ACK, 0.0)
    with Publisher("memory://") as publisher:
        samples = {**tally.samples(), **sources.read()}
        assert publisher.stats().published == 0
    for name, series in samples.items():
        metric = METRICS[name]
        for labels, value in series.items():
            assert len(labels) == len(metric.labels), name
            assert isinstance(value, tuple) == bool(metric.bounds), name
            assert not isinstance(value, tuple) or len(value) == len(metric.bounds) + 2, name


def test_names_follow_the_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"outbox_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.bounds) == (metric.kind == "histogram"), name


PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_the_page_on_metrics_has_them_all_with_their_labels() -> None:
    rows = re.findall(r"^\| `(outbox_\w+)` \| (\w+) \| (.*?) \|", PAGE, re.MULTILINE)
    documented = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows
    }
    assert documented == {name: (each.kind, each.labels) for name, each in METRICS.items()}


def test_the_page_on_metrics_has_all_outcomes() -> None:
    [table] = re.findall(r"^\| outcome \|.*?(?=^$)", PAGE, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == OUTCOMES
