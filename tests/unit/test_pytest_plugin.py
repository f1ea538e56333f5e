"""The fixture ``collected_events``: matching, failing readably, leaving nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import EventCollector, Publisher, auto_publishing, enqueue_event, publish
from outbox.messages.topics import matches
from outbox.testing import CollectedEvents, Matches


def enqueue_all(*payloads: object, target: str = "order.placed") -> None:
    with auto_publishing():
        for payload in payloads:
            enqueue_event(payload, target, headers={"tenant": "acme"})


@pytest.mark.parametrize(
    ("pattern", "target", "expected"),
    [
        ("order.placed", "order.placed", True),
        ("order.placed", "order_placed", False),
        ("order.*", "order.placed", True),
        ("order.*", "order.placed.late", False),
        ("order.*", "order", False),
        ("*.placed", "order.placed", True),
        ("order.#", "order", True),
        ("order.#", "order.placed.late", True),
        ("#.late", "late", True),
        ("#.late", "order.placed.late", True),
        ("#.late", "order.placed", False),
        ("a.#.b", "a.b", True),
        ("a.#.b", "a.x.y.b", True),
        ("#", "anything.at.all", True),
        ("a.*.#", "a", False),
        ("a+b", "aab", False),
        ("*", "", True),
    ],
)
def test_patterns_match_as_a_topic_exchange_does(pattern: str, target: str, expected: bool) -> None:
    assert matches(pattern, target) is expected


words = st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=4)


@given(words, st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=4))
def test_patterns_match_as_the_definition_says(target: list[str], pattern: list[str]) -> None:
    def by_definition(pattern: list[str], words: list[str]) -> bool:
        if not pattern:
            return not words
        if pattern[0] == "#":
            return any(by_definition(pattern[1:], words[n:]) for n in range(len(words) + 1))
        return (
            bool(words) and pattern[0] in ("*", words[0]) and by_definition(pattern[1:], words[1:])
        )

    assert matches(".".join(pattern), ".".join(target)) is by_definition(pattern, target)


def test_the_matching_event_is_returned(collected_events: CollectedEvents) -> None:
    enqueue_all({"id": 1, "items": [{"sku": "a", "n": 2}]}, {"id": 2, "items": []})
    event = collected_events.assert_published(
        "order.*", {"items": [{"sku": "a"}]}, headers={"tenant": "acme"}
    )
    assert event.payload["id"] == 1
    several = collected_events.assert_published("order.#", times=2)
    assert isinstance(several, Matches)
    assert [one.payload["id"] for one in several] == [1, 2]
    assert collected_events.assert_published("#", {"id": 2}, times=1).payload["id"] == 2


def test_a_single_event_is_expected_but_several_match(
    collected_events: CollectedEvents,
) -> None:
    enqueue_all({"id": 1}, {"id": 2})
    event = collected_events.assert_published("order.*")
    with pytest.raises(AssertionError, match="2 events match, so there is no single payload"):
        _ = event.payload
    with pytest.raises(AssertionError, match=r"expected 1 published .* found 2"):
        collected_events.assert_published("order.*", times=1)
    assert not hasattr(event, "no_such_attribute")


class Anything:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_payload_matches_by_its_parts_and_by_any_object_with_equality(
    collected_events: CollectedEvents,
) -> None:
    enqueue_all({"id": 1, "at": "now", "list": [1, {"a": 1, "b": 2}], "none": None})
    matching: list[Any] = [
        {},
        {"at": Anything()},
        {"list": [1, {"a": 1}]},
        {"list": Anything()},
        {"none": None},
    ]
    for payload in matching:
        collected_events.assert_published("order.placed", payload)
    others: list[Any] = [
        {"id": 2},
        {"missing": None},
        {"list": [1]},
        {"list": [{"a": 1}, 1]},
        {"id": {"a": 1}},
        [],
        None,
    ]
    for payload in others:
        collected_events.assert_not_published("order.placed", payload)
    collected_events.assert_not_published("order.placed", headers={"tenant": "other"})


def test_a_failure_shows_the_events_with_the_nearest_first(
    collected_events: CollectedEvents,
) -> None:
    enqueue_all({"unrelated": 1}, target="user.created")
    enqueue_all({"id": 2, "total": "9.99"}, {"id": 1, "total": "9.99"})
    with EventCollector.use(EventCollector()):
        enqueue_event({"id": 3}, "order.placed")
        with pytest.raises(AssertionError) as caught:
            collected_events.assert_published("order.placed", {"id": 1, "total": "10.00"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("expected at least 1 published event to 'order.placed' with")
    assert lines[1] == "published:"
    assert '"id": 1' in lines[2]
    assert '"id": 2' in lines[3]
    assert "user.created" in lines[4]
    assert lines[5] == "pending (not published yet):"
    assert '"id": 3' in lines[6]


def test_negative_assertions_name_what_was_published(collected_events: CollectedEvents) -> None:
    collected_events.assert_nothing_published()
    collected_events.assert_not_published("#")
    with pytest.raises(AssertionError, match="no event was enqueued"):
        collected_events.assert_published("#")
    enqueue_all({"id": 1})
    with pytest.raises(AssertionError, match=r"found 1\npublished:\n  'order.placed'"):
        collected_events.assert_nothing_published()
    with pytest.raises(AssertionError, match=r"expected no published event to 'order\.\*'"):
        collected_events.assert_not_published("order.*")


def test_pending_published_and_cleared_events_are_distinguished(
    collected_events: CollectedEvents,
) -> None:
    with pytest.raises(KeyError), auto_publishing():
        cleared = enqueue_event(1, "t")
        raise KeyError
    with EventCollector.use(EventCollector()):
        pending = enqueue_event(2, "t")
        assert list(collected_events.pending) == [pending]
        publish()
    assert list(collected_events.pending) == []
    assert collected_events.published == (pending,)
    assert collected_events.cleared == (cleared,)
    assert repr(collected_events) == "<CollectedEvents 1 published, 1 cleared>"


def test_an_explicit_publisher_does_not_reach_its_broker(
    collected_events: CollectedEvents,
) -> None:
    publisher = Publisher("amqp://127.0.0.1:1/")
    with auto_publishing(publisher=publisher) as block:
        event = enqueue_event(1, "t")
    assert block.report is not None
    assert block.report.published == (event,)
    assert publisher.close() == ()


SUITE = """
import asyncio
import threading

import pytest

from outbox import EventCollector, auto_publishing, enqueue_event, publish

pytestmark = pytest.mark.filterwarnings("ignore:an event was enqueued outside")

@pytest.mark.parametrize("n", range(20))
def test_each_has_its_own(collected_events, n):
    collected_events.assert_nothing_published()
    assert collected_events.pending == ()
    enqueue_event("left behind", "left")
    def work():
        with auto_publishing():
            enqueue_event(n, "thread")
    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    collected_events.assert_published("thread", n, times=3)
    collected_events.assert_not_published("left")

@pytest.mark.asyncio
@pytest.mark.parametrize("n", range(20))
async def test_each_has_its_own_on_a_loop(collected_events, n):
    async def work():
        async with auto_publishing():
            enqueue_event(n, "task")
    await asyncio.gather(*(asyncio.create_task(work()) for _ in range(3)))
    collected_events.assert_published("task", n, times=3)

@pytest.mark.anyio
async def test_anyio(collected_events):
    async with auto_publishing():
        enqueue_event(1, "anyio")
    collected_events.assert_published("anyio")

@pytest.fixture
def anyio_backend():
    return "asyncio"

def test_without_the_fixture_nothing_is_left():
    assert len(EventCollector.current()) == 0
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["one process", "xdist"])
@pytest.mark.slow
def test_the_fixture_is_safe_under_threads_loops_and_xdist(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "42 passed" in done.stdout
    assert "lost" not in done.stderr


KEPT = """
import gc, weakref
import pytest
from outbox import auto_publishing, enqueue_event
from outbox.consumers import consumer

known = []

@consumer("work", topics=["#"])
def work(event):
    raise LookupError("a traceback")

@pytest.mark.parametrize("fixture", ["collected_events", "embedded_events"])
def test_events(request, fixture):
    events = request.getfixturevalue(fixture)
    with auto_publishing():
        enqueue_event(1, "x")
    events.deliver_all(work, raise_errors=False)
    known.append(weakref.ref(events))

def test_afterwards():
    gc.collect()
    assert [each() for each in known] == [None, None]
"""


@pytest.mark.slow
def test_nothing_of_a_test_is_kept_until_the_session_ends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(KEPT)
    options = ("-p", "no:cacheprovider", "-p", "no:randomly")
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=3)


def test_two_fixtures_in_one_test_are_refused_naming_both(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_both(collected_events, embedded_events): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*by the fixture collected_events of *:test_both: the fixture embedded_events of *"]
    )


@pytest.mark.parametrize("in_ci", [False, True])
@pytest.mark.slow
def test_live_tests_without_a_server_say_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, in_ci: bool
) -> None:
    monkeypatch.setenv("CI", "1" if in_ci else "")
    pytester.makeconftest("from outbox.testing import servers\nservers._RABBITMQ = ()\n")
    pytester.makepyfile("def test_live(live_events): pass")
    result = pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(errors=int(in_ci), skipped=int(not in_ci))
    result.stdout.fnmatch_lines(["*apt-get install rabbitmq-server*embedded_events*"])


ALWAYS = """
    import unittest
    import pytest
    import outbox
    from outbox import auto_publishing, enqueue_event
    from outbox.testing import CollectedEventsMixin, recorded

    def publish(target="order.placed"):
        with auto_publishing():
            enqueue_event(1, target)

    publish("at.import")

    @pytest.fixture(scope="session", autouse=True)
    def seeds():
        publish("in.session.fixture")
        yield
        publish("at.the.end")

    def test_without_the_fixture():
        publish()

    def test_with_the_fixture(collected_events):
        publish()
        collected_events.assert_published("order.placed", times=1)
        collected_events.assert_nothing_else_published()

    def test_in_a_block():
        publish()
        with recorded("a block") as events:
            publish("other")
            events.assert_published("#", times=1)
        publish()

    def test_really(embedded_events):
        publish()
        assert embedded_events.assert_published("order.placed")

    def test_really_after_all(request):
        publish()
        events = request.getfixturevalue("embedded_events")
        publish()
        events.assert_published("order.placed", times=1)

    @pytest.mark.collected_events(strict=True)
    def test_strict(request):
        publish()
        request.getfixturevalue("collected_events")

    class TestCase(unittest.TestCase):
        def test_without_the_mixin(self):
            publish()

    class TestMixin(CollectedEventsMixin, unittest.TestCase):
        def test_with_the_mixin(self):
            publish()
            self.collected_events.assert_published("order.placed", times=1)

    @pytest.mark.xfail(strict=True, raises=outbox.UsageError)
    def test_twice(collected_events):
        with recorded("a block"):
            pass
"""


@pytest.mark.slow
def test_the_setting_always_keeps_every_event_from_the_real_broker(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = tmp_path / "real.db"
    monkeypatch.setenv("OUTBOX_URL", f"sqlite:///{real}")
    pytester.makepyfile(ALWAYS)
    pytester.makeconftest(
        """
        from outbox import auto_publishing, enqueue_event

        with auto_publishing():
            enqueue_event(1, "in.conftest")
        """
    )
    pytester.makeini("[pytest]\noutbox_always = true\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2")
    result.assert_outcomes(passed=8, xfailed=1)
    assert not real.stat().st_size
    pytester.makeini("[pytest]\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "without_the_fixture")
    assert real.stat().st_size


def test_a_strict_test_is_checked_however_it_has_got_its_events(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest
        from outbox import auto_publishing, enqueue_event

        @pytest.mark.collected_events(strict=True)
        def test_strict(request):
            request.getfixturevalue("collected_events")
            with auto_publishing():
                enqueue_event(1, "overlooked")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*to match an assertion, but 1 did not*"])
