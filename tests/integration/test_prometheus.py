"""prometheus_client in one process, and in several under gunicorn."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from outbox import EventCollector, Publisher
from outbox.telemetry import PrometheusCollector, metrics
from tests.waiting import wait_until


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_registry_has_what_outbox_renders_itself() -> None:
    registry = CollectorRegistry()
    PrometheusCollector().register(registry)
    with Publisher("memory://") as publisher:
        collector = EventCollector(publisher=publisher)
        collector.enqueue_event(1, "x")
        collector.publish()
        ours = values(metrics.render(metrics.snapshot()))
        theirs = values(generate_latest(registry).decode())
    assert ("outbox_events_total", frozenset({("fate", "published")})) in ours
    # Gauges of other tests' objects change by themselves.
    counted = ("_total", "_bucket", "_sum", "_count")
    steady = {each: value for each, value in ours.items() if each[0].endswith(counted)}
    assert {each: theirs.get(each) for each in steady} == steady
    assert {"outbox_build_info", "outbox_events_kept"} <= {name for name, _ in theirs}


def test_a_registry_refuses_a_second_collector() -> None:
    registry = CollectorRegistry()
    PrometheusCollector().register(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusCollector().register(registry)


def test_telemetry_alone_imports_no_prometheus_client() -> None:
    program = (
        "import sys, outbox.telemetry.metrics, outbox.consumers; "
        "assert 'prometheus_client' not in sys.modules and 'werkzeug' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_without_prometheus_client_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import outbox.telemetry\n"
        "try: outbox.telemetry.PrometheusCollector\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=30, capture_output=True, text=True
    )
    assert done.stdout.startswith("MissingExtra ")
    assert "pip install 'outbox-events[metrics]'" in done.stdout


APPLICATION = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from outbox import auto_publishing, configure, enqueue_event
from outbox.telemetry import PrometheusCollector, prometheus

prometheus._EVERY = 0.2
configure("memory://")
with auto_publishing():
    enqueue_event(1, "imported")
PrometheusCollector().register()


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/publish":
        with auto_publishing():
            enqueue_event(1, "asked")
        return [str(os.getpid()).encode()]
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return [generate_latest(registry)]
"""


@pytest.mark.one_python
@pytest.mark.parametrize("preload", [False, True])
def test_processes_of_gunicorn_add_up(tmp_path: Path, preload: bool) -> None:
    (tmp_path / "shop.py").write_text(APPLICATION)
    files = tmp_path / "files"
    files.mkdir()
    log = tmp_path / "log"
    command = [
        *(sys.executable, "-m", "gunicorn", "shop:app", "--bind", "127.0.0.1:0"),
        *("--workers", "2", "--worker-tmp-dir", str(tmp_path)),
        *(["--preload"] if preload else []),
    ]
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(files)}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: log.read_text().count("Booting worker") == 2, 30)
        [address] = re.findall(r"Listening at: (http://\S+)", log.read_text())

        def get(path: str) -> str:
            with urllib.request.urlopen(f"{address}{path}", timeout=10) as response:
                return str(response.read().decode())

        asked = [get("/publish") for _ in range(40)]
        processes = len(set(asked)) + 1 if preload else 2  # that have published

        def are_written() -> bool:
            sizes = [file.stat().st_size for file in files.glob("*.db")]
            return len(sizes) == 4 * processes and all(sizes)

        # prometheus_client can't read a file that another process is creating.
        wait_until(are_written, 20)
        imports = 1 if preload else 2  # of the module that publishes an event
        published = ("outbox_events_total", frozenset({("fate", "published")}))
        wait_until(lambda: values(get("/metrics")).get(published) == len(asked) + imports, 20)
        found = values(get("/metrics"))
        count = found["outbox_publish_duration_seconds_count", frozenset()]
        assert count == len(asked) + imports
        assert found["outbox_connected", frozenset({("link", "publisher")})] == processes
        assert "outbox_oldest_kept_age_seconds" in {name for name, _ in found}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    assert "Traceback" not in log.read_text()
