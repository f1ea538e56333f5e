"""Probes and metrics over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from outbox import UsageError, configure, enqueue_event, publish
from outbox.service.http import Address, HTTPFace, ServiceSource, listening, parse_address
from outbox.service.state import ServiceState, WorkerState
from outbox.telemetry.wsgi import ServiceApp
from tests.services import Service
from tests.waiting import wait_until

READY = ServiceState(
    workers=(WorkerState(1, 4711, "ready", 3.0, report={"in_flight": 2, "counts": {}}),),
    ready=True,
    phase="ready",
)


@contextlib.contextmanager
def answering(where: str = "127.0.0.1:0", **options: bool) -> Iterator[tuple[HTTPFace, int]]:
    face = HTTPFace(parse_address(where), **options)
    face.turn(Service(READY))
    try:
        yield face, int(face.urls[0].rpartition(":")[2]) if face.urls else 0
    finally:
        face.close()


def get(
    port: int, path: str, *, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("localhost:0", ("localhost", 0)),
        (":9100", ("", 9100)),
        ("[::]:9100", ("::", 9100)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_an_address_names_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == Address(*address)


@pytest.mark.parametrize(
    "text", ["9100", "localhost", "::1:9100", "a:b", "[x]:1", "h:70000", "h:-1", "a b:1", ""]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address; use HOST:PORT, for example 127"):
        parse_address(text)


def test_the_pages_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as (face, port):
        assert face.urls == (f"http://127.0.0.1:{port}",)
        response, text = get(port, "/livez")
        assert (response.status, text) == (200, "live\n")
        assert response.getheader("Server") == "outbox"
        assert response.getheader("Connection") == "close"
        assert response.getheader("Cache-Control") == "no-store"
        assert get(port, "/readyz")[1] == "ready\n"
        response, text = get(port, "/metrics")
        assert (response.getheader("Content-Type") or "").startswith("text/plain; version=0.0.4")
        assert 'outbox_workers{state="ready"} 1\n' in text
        status = json.loads(get(port, "/status")[1])
        assert (status["phase"], status["ready"]) == ("ready", True)
        [worker] = status["workers"]
        assert (worker["pid"], worker["phase"], worker["in_flight"]) == (4711, "ready", 2)
        response, text = get(port, "/")
        assert (response.status, "/livez" in text) == (404, True)


def test_only_get_and_head_are_allowed() -> None:
    with answering() as (_, port):
        response, text = get(port, "/metrics", method="HEAD")
        assert (response.status, text) == (200, "")
        assert int(response.getheader("Content-Length") or 0) > 0
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            response, _ = get(port, "/livez", method=method)
            assert (response.status, response.getheader("Allow")) == (405, "GET, HEAD")


def test_a_probe_names_each_reason() -> None:
    state = ServiceState(reasons=("worker 1 is down", "worker 2 is starting"), phase="starting")
    with answering() as (face, port):
        face.turn(Service(state))
        response, text = get(port, "/readyz")
        assert (response.status, text) == (503, "worker 1 is down\nworker 2 is starting\n")
        response, text = get(port, "/readyz", Accept="application/json")
        assert (response.status, json.loads(text)) == (
            503,
            {"ready": False, "reasons": ["worker 1 is down", "worker 2 is starting"]},
        )
        response, text = get(port, "/readyz", Accept="*/*")
        assert response.getheader("Content-Type") == "text/plain; charset=utf-8"
        assert get(port, "/livez")[0].status == 200


def worker(phase: Any = "ready", slot: int = 1) -> WorkerState:
    return WorkerState(slot, 1, phase, 1.0, report={"counts": {}})


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [
        (READY, True, True),
        (ServiceState(workers=(worker(),), ready=True, phase="ready"), True, True),
        (ServiceState(workers=(worker("stuck"),), reasons=("stuck",)), True, False),
        (ServiceState(phase="stopping", reasons=("stopping",)), True, False),
        (ServiceState(phase="leaving"), True, False),
        (ServiceState(phase="given up", reasons=("5 ended in 300 s",)), False, False),
        (ServiceState(mends=False, reasons=("worker 1 is down",)), False, False),
    ],
)
def test_only_what_the_parent_cannot_mend_is_not_live(
    state: ServiceState, live: bool, ready: bool
) -> None:
    source = ServiceSource()
    source.update(state)
    assert (not source.live(), not source.ready()) == (live, ready)


def test_a_parent_whose_loop_does_not_turn_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ServiceSource()
    source.update(READY)
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 60)
    assert source.live() == ["the parent process has not reacted for 60 s"]


def test_metrics_are_sums_over_processes_that_are_and_were() -> None:
    def counts(number: int) -> dict[str, Any]:
        return {"outbox_messages_total": [[["q", "C", "acked"], number]]}

    source = ServiceSource()
    workers = tuple(
        WorkerState(slot, slot, "ready", 1.0, report={"counts": counts(10 * slot)})
        for slot in (1, 2)
    )
    source.update(
        ServiceState(
            workers=workers, ready=True, phase="ready", base=counts(500), restarts={"died": 3}
        )
    )
    text = source.metrics()
    assert 'outbox_messages_total{queue="q",consumer="C",outcome="acked"} 530\n' in text
    assert 'outbox_worker_restarts_total{reason="died"} 3\n' in text
    assert 'outbox_workers{state="stuck"} 0\n' in text
    assert "outbox_build_info{version=" in text


def test_status_is_shown_to_other_machines_only_if_asked() -> None:
    with answering(":0") as (_, port):
        response, text = get(port, "/status")
        assert (response.status, "--http-status" in text) == (404, True)
        assert get(port, "/livez")[0].status == 200
    with answering(":0", with_status=True) as (_, port):
        assert get(port, "/status")[0].status == 200


@pytest.mark.parametrize("where", [":0", "[::]:0", "localhost:0"])
def test_both_families_are_answered(where: str) -> None:
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with answering(where) as (face, port):
        assert port
        for host in ("127.0.0.1", "::1"):
            assert get(port, "/livez", host=host)[0].status == 200
        assert all(url.endswith(f":{port}") for url in face.urls)


def _has_ipv6() -> bool:
    try:
        with contextlib.closing(socket.create_server(("::1", 0), family=socket.AF_INET6)):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_what_no_host_can_be_called_is_wrong_usage(host: str) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on .*:8080: that can't be a host's name"):
        HTTPFace(parse_address(f"{host}:8080"))


def test_a_used_port_is_wrong_usage() -> None:
    with answering() as (_, port):
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: "):
            HTTPFace(Address("127.0.0.1", port))


def test_a_successor_takes_the_port_when_its_predecessor_leaves() -> None:
    with answering() as (old, port):
        with answering(f"127.0.0.1:{port}", may_wait=True) as (new, _):
            assert not new.urls
            assert get(port, "/readyz")[0].status == 200
            old.turn(Service(ServiceState(phase="leaving", reasons=("leaving",))))
            assert not old.urls
            wait_until(lambda: new.urls)
            assert get(port, "/readyz")[0].status == 200
            assert get(port, "/status")[0].status == 200


def silent(port: int, number: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(number)]


@pytest.mark.slow
def test_silent_clients_neither_pile_up_nor_keep_others_out() -> None:
    before = threading.active_count()
    with answering() as (_, port):
        clients = silent(port, 50)
        try:
            began = time.monotonic()
            assert get(port, "/livez")[0].status == 200
            assert time.monotonic() - began < 2
            assert threading.active_count() - before <= 18
            # Those that are left are ended in time, though one sends a byte now and then.
            clients[-1].send(b"G")
            began = time.monotonic()
            wait_until(lambda: threading.active_count() - before <= 1, timeout=9)
            assert time.monotonic() - began < 8
        finally:
            for client in clients:
                client.close()


def test_nonsense_is_answered_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    with answering() as (_, port):
        for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET /livez HTTP/9.9\r\n\r\n", b"\r\n\r\n"):
            [client] = silent(port, 1)
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)
            client.close()
        assert get(port, "/livez")[0].status == 200
    assert capfd.readouterr() == ("", "")


def test_a_listening_socket_is_not_inherited() -> None:
    for sock in listening(Address("127.0.0.1", 0)):
        assert not sock.get_inheritable()
        sock.close()


def test_an_application_shows_its_own_process() -> None:
    def shop(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"shop"]

    client = Client(
        DispatcherMiddleware(shop, {"/outbox": ServiceApp(), "/metrics": ServiceApp(status=False)})
    )
    assert client.get("/outbox/livez").status_code == 200
    assert client.get("/outbox/readyz").status_code == 200  # nothing is configured
    publisher = configure("memory://")
    try:
        assert client.get("/outbox/readyz").status_code == 200
        assert "outbox_build_info" in client.get("/metrics").text
        assert json.loads(client.get("/outbox/status").text)["publisher"]["kept"] == 0
        assert client.get("/metrics/status").status_code == 404
        assert client.get("/").text == "shop"
    finally:
        publisher.close()
    assert client.get("/outbox/readyz").text == "the publisher is closed\n"


def test_a_process_is_not_ready_when_it_accepts_no_more_events() -> None:
    client = Client(ServiceApp())
    publisher = configure("amqp://127.0.0.1:1/", max_kept=1, timeout=0.2)
    try:
        enqueue_event(1, "x")
        publish()
        wait_until(lambda: len(publisher.kept) == 1)
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.text == "the publisher accepts no more events: 1 are kept\n"
        assert client.get("/livez").status_code == 200
    finally:
        publisher.close(0)
