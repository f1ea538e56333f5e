"""uWSGI, which forks its workers from a master that has imported the application."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.integration.test_servers import APPS, UWSGI, Served
from tests.waiting import wait_until

URL = "amqp://localhost/"  # nothing connects to it

LOOPS = {
    "threads": ["--py-call-uwsgi-fork-hooks"],
    "gevent": ["--gevent", "10", "--gevent-early-monkey-patch"],
}


@contextlib.contextmanager
def two_workers(loop: str, url: str, name: str, folder: Path) -> Iterator[Served]:
    options = ["--processes", "2", "--need-app", "--module", f"{APPS}.uwsgi_app:app", *LOOPS[loop]]
    served = Served(["uwsgi", *options], url, name, folder)
    try:
        yield served
    finally:
        served.stop()


def ask_both_workers(served: Served) -> None:
    """Two requests side by side; gevent lets one worker have both, so that more are needed."""
    with ThreadPoolExecutor(8) as pool:
        for status, _ in pool.map(served.get, ["/"] * 8):
            assert status == 200


def payloads(inspector: Inspector, queue: str, count: int) -> list[Any]:
    found = [message.payload for message in inspector.messages(queue, count)]
    return found + [message.payload for message in inspector.all(queue)]


REFUSED = {
    # What uWSGI says before version 2.0.27, unless threads are enabled.
    "no threads": ("import uwsgi; uwsgi.has_threads = 0", "set enable-threads = true"),
    "greenlets outside of its loop": (
        "import gevent.monkey; gevent.monkey.patch_all()",
        "runs greenlets of gevent only while it serves a request",
    ),
    "a thread beside which it forks": (
        f"import os; os.environ['OUTBOX_URL'] = {URL!r}\n"
        "import outbox; outbox.enqueue_event(1, 'x')",
        "set py-call-uwsgi-fork-hooks = true (or lazy-apps), or publish only in workers",
    ),
}


@pytest.mark.hazard("D12")
@pytest.mark.parametrize(("before", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_uwsgi_that_cannot_run_the_publisher_is_refused_and_its_log_says_why(
    tmp_path: Path, before: str, reason: str
) -> None:
    (tmp_path / "refused.py").write_text(f"{before}\nimport outbox\noutbox.configure({URL!r})\n")
    options = ["--http-socket", "127.0.0.1:0", "--master", "--need-app"]
    done = subprocess.run(
        [sys.executable, "-c", UWSGI, *options, "--module", "refused"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode != 0
    assert "UsageError: a publisher's thread cannot work here: uWSGI" in done.stdout
    assert reason in done.stdout


@pytest.mark.hazard("D12")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.slow
def test_a_worker_publishes_over_its_own_connection_after_the_master_has_published(
    proxy: FaultProxy, inspector: Inspector, name: str, tmp_path: Path, loop: str
) -> None:
    queue = inspector.queue(name, name)
    with two_workers(loop, proxy.url, name, tmp_path) as served:
        [imported] = payloads(inspector, queue, 1)
        ask_both_workers(served)
        requests = payloads(inspector, queue, 8)
        workers = {payload["request"] for payload in requests}
        assert len(requests) == 8
        assert imported["import"] not in workers
        assert proxy.accepted == 1 + len(workers)
        assert served.stop() == 0, served.log
    assert "kept" not in served.log


@pytest.mark.hazard("D12")
@pytest.mark.parametrize("loop", LOOPS)
def test_events_kept_by_the_master_are_not_published_by_its_workers_too(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loop: str,
) -> None:
    queue = inspector.queue(name, name)
    monkeypatch.setenv("OUTBOX_TIMEOUT", "0.1")
    proxy.black_hole()  # nor does a thread of the master write to the log while it forks
    with two_workers(loop, proxy.url, name, tmp_path) as served:
        wait_until(lambda: "1 event(s) kept" in served.log)
        proxy.heal()
        ask_both_workers(served)
        found = payloads(inspector, queue, 9 if loop == "threads" else 8)
        assert served.stop() == 0, served.log
    found += payloads(inspector, queue, 0)
    # With gevent's loop in the workers, the greenlets of the master do not run.
    assert sum("import" in payload for payload in found) == (loop == "threads")
    assert sum("request" in payload for payload in found) == 8


@pytest.mark.parametrize("loop", LOOPS)
def test_workers_that_stop_gracefully_wait_for_events_in_flight(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loop: str,
) -> None:
    queue = inspector.queue(name, name)
    monkeypatch.setenv("OUTBOX_DRAIN_TIMEOUT", "15")
    with two_workers(loop, proxy.url, name, tmp_path) as served:
        assert "import" in inspector.get(queue).payload
        proxy.refuse()
        ask_both_workers(served)
        served.ask_to_stop()
        with pytest.raises(subprocess.TimeoutExpired):
            served.wait(1)
        proxy.heal()
        assert served.wait() == 0, served.log
    assert len(payloads(inspector, queue, 8)) == 8
    assert "lost, never confirmed" not in served.log
