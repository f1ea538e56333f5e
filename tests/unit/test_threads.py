"""Where a publisher's thread can run, and where it is refused with advice."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from outbox import Publisher, UsageError, configuration, configure
from outbox.system.threads import greenlets_of, why_not, why_not_yet

URL = "amqp://localhost/"  # nothing connects to it


def gevent(*patched: str) -> dict[str, Any]:
    return {"gevent.monkey": SimpleNamespace(is_module_patched=patched.__contains__)}


def eventlet(*patched: str) -> dict[str, Any]:
    return {"eventlet.patcher": SimpleNamespace(is_monkey_patched=patched.__contains__)}


def uwsgi(**attributes: Any) -> dict[str, Any]:
    return {"uwsgi": SimpleNamespace(**attributes)}


GEVENT = gevent("threading", "socket", "select", "time", "ssl")
EVENTLET = eventlet("thread", "socket", "select", "time", "os")

WORKS = {
    "plain": {},
    "gevent": GEVENT,
    "gevent, not patched": gevent(),
    "gevent, patched where it does not matter": gevent("time", "subprocess"),
    "eventlet": EVENTLET,
    "eventlet, not patched": eventlet(),
    "both, one of them patched": {**gevent(), **EVENTLET},
    "uWSGI with threads": uwsgi(has_threads=1, loop=None),
    "uWSGI that does not tell": uwsgi(),
    "uWSGI's own loop for gevent": {**uwsgi(has_threads=1, loop=b"gevent"), **GEVENT},
    "uWSGI's own loop for gevent, not patched": uwsgi(has_threads=1, loop=b"gevent"),
}

REFUSED = {
    "gevent without threads": (
        gevent("socket", "select"),
        "gevent has patched socket, select, but not threading: "
        "call gevent.monkey.patch_all() without arguments, before all else, or do not patch",
    ),
    "gevent, threads alone": (gevent("threading"), "threading, but not socket, select"),
    "gevent without select": (gevent("threading", "socket"), "but not select"),
    "eventlet without threads": (
        eventlet("socket", "select"),
        "eventlet has patched socket, select, but not thread: "
        "call eventlet.monkey_patch() without arguments, before all else, or do not patch",
    ),
    "uWSGI without threads": (uwsgi(has_threads=0, loop=None), "set enable-threads = true"),
    "uWSGI and gevent without its loop": (
        {**uwsgi(has_threads=1, loop=None), **GEVENT},
        "uWSGI runs greenlets of gevent only while it serves a request",
    ),
    "uWSGI and eventlet": (
        {**uwsgi(has_threads=1, loop=b"gevent"), **EVENTLET},
        "uWSGI runs greenlets of eventlet only while it serves a request",
    ),
}


@pytest.mark.parametrize("modules", WORKS.values(), ids=WORKS)
def test_a_publisher_is_created_where_its_thread_can_run(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not(modules) is None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    Publisher(URL).close()


@pytest.mark.hazard("A17")
@pytest.mark.parametrize(("modules", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_publisher_whose_thread_cannot_run_is_refused_with_advice(
    modules: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UsageError) as caught:
        Publisher(URL)
    assert str(caught.value).startswith("a publisher's thread cannot work here: ")
    assert reason in str(caught.value)
    with pytest.raises(UsageError):
        configure(URL)
    assert configuration.configured_publisher() is None


def test_a_transport_without_a_thread_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in gevent("threading").items():
        monkeypatch.setitem(sys.modules, name, module)
    with Publisher("memory://") as publisher:
        assert publisher.connected


def test_threads_patched_badly_after_the_publisher_was_created_are_refused_at_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Publisher(URL) as publisher:
        for name, module in gevent("threading").items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(UsageError, match="but not socket, select"):
            publisher.make_ready()


def test_with_a_running_thread_uwsgis_master_must_run_pythons_fork_hooks() -> None:
    def in_process(pid: int, *options: str, **modules: Any) -> str | None:
        master = SimpleNamespace(masterpid=lambda: 17, opt=dict.fromkeys(options, True))
        return why_not_yet({"uwsgi": master, **modules}, pid)

    assert "set py-call-uwsgi-fork-hooks = true" in (in_process(17, "master") or "")
    assert in_process(17, "master", "py-call-uwsgi-fork-hooks") is None
    assert in_process(17, "master", **GEVENT) is None
    assert in_process(18, "master") is None
    assert why_not_yet({}, 17) is None
    assert why_not_yet(uwsgi(masterpid=lambda: 0), 17) is None


def test_the_library_that_replaced_threads_with_greenlets_is_detected() -> None:
    assert greenlets_of(GEVENT) == "gevent"
    assert greenlets_of({**gevent(), **EVENTLET}) == "eventlet"
    assert greenlets_of(gevent("socket", "select")) is None
    assert greenlets_of({}) is None


REAL = {
    "import gevent.monkey": "works",
    "import gevent.monkey; gevent.monkey.patch_all()": "works",
    "import gevent.monkey; gevent.monkey.patch_all(thread=False)": "but not threading: call",
    "import gevent.monkey; gevent.monkey.patch_all(select=False)": "but not select: call",
    "import eventlet": "works",
    "import eventlet; eventlet.monkey_patch()": "works",
    "import eventlet; eventlet.monkey_patch(thread=False)": "but not thread: call",
}


@pytest.mark.parametrize(("patch", "outcome"), REAL.items(), ids=REAL)
def test_the_real_libraries_are_detected_by_what_they_have_patched(
    patch: str, outcome: str
) -> None:
    program = f"""if True:
        {patch}
        import outbox
        try:
            outbox.configure({URL!r})
        except outbox.UsageError as error:
            print(error)
        else:
            print("works")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert outcome in done.stdout
