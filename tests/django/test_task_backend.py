"""Django's own tasks with outbox as their backend."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core import checks
from django.core.management import call_command
from django.db import transaction
from django.test import override_settings
from django.utils import timezone

from outbox import EventCollector, InvalidEvent, Publisher, enqueue_event
from outbox.consumers import RetryPolicy, Worker
from outbox.consumers.discovery import load
from outbox.consumers.outcome import Ack, Again, Dead
from outbox.django.models import StoredEvent
from outbox.messages.headers import TASK
from outbox.testing import CollectedEvents
from tests.django.shop.models import Order, noted
from tests.waiting import wait_until

tasks: Any = pytest.importorskip("django.tasks", reason="Django 6.0 has tasks")
InvalidTask: Any = tasks.exceptions.InvalidTask
DoesNotExist: Any = tasks.exceptions.TaskResultDoesNotExist
Mismatch: Any = tasks.exceptions.TaskResultMismatch
mailing: Any = pytest.importorskip("tests.django.shop.mailing")

pytestmark = [
    pytest.mark.usefixtures("databases"),
    pytest.mark.parametrize("databases", ["sqlite"], indirect=True),
]

NAMES = ("task_enqueued", "task_started", "task_finished")


@pytest.fixture(autouse=True)
def sent() -> Iterator[list[Any]]:
    """The signals, with the result that each had."""
    noted.clear()
    seen: list[Any] = []
    receivers = []
    for name in NAMES:

        def receive(sender: Any, task_result: Any, name: str = name, **_: Any) -> None:
            seen.append((name, sender.__name__, pickle.loads(pickle.dumps(vars_of(task_result)))))

        getattr(tasks.signals, name).connect(receive)
        receivers.append((getattr(tasks.signals, name), receive))
    yield seen
    for signal, receiver in receivers:
        signal.disconnect(receiver)


def vars_of(result: Any) -> Any:
    names = (*(name for name in type(result).__slots__ if name != "task"),)
    return SimpleNamespace(**{name: getattr(result, name) for name in names})


def outcomes(collected_events: CollectedEvents) -> list[Any]:
    return [each.outcome for each in collected_events.deliver(raise_errors=False)]


@pytest.fixture
def options() -> Iterator[Any]:
    """A function that sets ``OPTIONS`` of the backend for the rest of the test."""
    overriding: list[Any] = []

    def use(**values: Any) -> None:
        override = override_settings(
            TASKS={"default": {"BACKEND": "outbox.django.TaskBackend", "OPTIONS": values}}
        )
        override.enable()
        overriding.append(override)

    yield use
    for override in overriding:
        override.disable()


def test_a_call_is_an_event_and_a_worker_runs_it(
    collected_events: CollectedEvents, sent: list[Any]
) -> None:
    result = mailing.send.enqueue("ann@example.com", options={"cc": ("bob", b"carl")})
    assert (result.status, result.args, result.backend) == (
        tasks.TaskResultStatus.READY,
        ["ann@example.com"],
        "default",
    )
    [event] = StoredEvent.objects.all()
    assert (event.id, event.target) == (result.id, "tasks")
    assert json.loads(event.headers)[TASK] == "tests.django.shop.mailing:send"
    assert (event.priority, event.exchange) == (4, "")
    collected_events.assert_later(mailing.send, ...)
    assert outcomes(collected_events) == [Ack()]
    assert noted == [("ann@example.com", None, {"cc": ["bob", "carl"]})]
    assert [name for name, _, _ in sent] == list(NAMES)
    assert {sender for _, sender, _ in sent} == {"TaskBackend"}
    started, finished = sent[1][2], sent[2][2]
    assert (started.id, started.status) == (result.id, tasks.TaskResultStatus.RUNNING)
    assert started.enqueued_at <= started.started_at == started.last_attempted_at
    assert len(started.worker_ids) == 1
    assert finished.status == tasks.TaskResultStatus.SUCCESSFUL
    assert finished._return_value == "sent to ann@example.com"
    assert finished.finished_at >= finished.started_at
    assert finished.errors == []


def test_a_call_belongs_to_the_transaction(collected_events: CollectedEvents) -> None:
    with pytest.raises(KeyError), transaction.atomic():
        mailing.send.enqueue("a")
        raise KeyError
    with transaction.atomic():
        mailing.send.enqueue("b")
        assert noted == []
    collected_events.assert_later(mailing.send, address="b")
    outcomes(collected_events)
    assert noted == [("b", None, None)]


def test_arguments_are_those_that_json_has(collected_events: CollectedEvents) -> None:
    with pytest.raises(TypeError, match="Unsupported type"):
        mailing.send.enqueue(datetime.date(2030, 1, 1))
    with pytest.raises(ValueError, match="Unsupported value"):
        mailing.send.enqueue(b"\xff")
    with pytest.raises(InvalidEvent, match="missing a required argument: 'address'"):
        mailing.send.enqueue()
    assert not StoredEvent.objects.exists()
    given = {"task": 2, "args": [3], "options": {1: (2, None)}}
    result = mailing.log.enqueue(1.5, **given)
    assert result.kwargs["options"] == {1: [2, None]}
    outcomes(collected_events)
    assert noted == [((1.5,), {**given, "options": {"1": [2, None]}})]


def test_the_context_counts_the_attempts(collected_events: CollectedEvents, options: Any) -> None:
    result = mailing.count.enqueue(step=2)
    assert outcomes(collected_events) == [Ack()]
    assert noted == [(1, result.id, 2)]


def test_a_failure_ends_the_task_after_its_last_attempt(
    collected_events: CollectedEvents, options: Any, sent: list[Any]
) -> None:
    options(retry=RetryPolicy(max_attempts=2, delay=0))
    mailing.fail.enqueue("lost")
    first, second = (each.outcome for each in collected_events.deliver_all(raise_errors=False))
    assert isinstance(first, Again)
    assert isinstance(second, Dead)
    assert [name for name, _, _ in sent] == [*NAMES[:2], *NAMES[1:]]
    assert [len(result.worker_ids) for _, _, result in sent] == [0, 1, 2, 2]
    finished = sent[-1][2]
    assert finished.status == tasks.TaskResultStatus.FAILED
    [error] = finished.errors
    assert error.exception_class is LookupError
    assert "LookupError: lost" in error.traceback
    assert Order.objects.count() == 2  # a task has no transaction of outbox's


def test_what_json_does_not_have_is_no_return_value(
    collected_events: CollectedEvents, options: Any, sent: list[Any]
) -> None:
    options(retry=RetryPolicy(max_attempts=5, delay=0))
    mailing.returns.enqueue()
    [outcome] = [each.outcome for each in collected_events.deliver_all(raise_errors=False)]
    assert isinstance(outcome, Dead)
    assert "what it returned can't be carried by JSON" in outcome.reason
    [error] = sent[-1][2].errors
    assert error.exception_class_path == "outbox.consumers.Reject"


def test_arguments_that_no_longer_fit_are_a_failure(
    collected_events: CollectedEvents, sent: list[Any]
) -> None:
    name = {TASK: "tests.django.shop.mailing:send"}
    enqueue_event({"args": [1, 2, 3]}, "tasks", exchange="", headers=name)
    enqueue_event({"args": 1}, "tasks", exchange="", headers=name)
    assert [type(outcome) for outcome in outcomes(collected_events)] == [Dead, Dead]
    assert [(one, result.args) for one, _, result in sent] == [
        ("task_finished", [1, 2, 3]),
        ("task_finished", []),
    ]


def test_coroutines_run_on_the_event_loop(
    collected_events: CollectedEvents, sent: list[Any]
) -> None:
    async def enqueue() -> list[str]:
        return [(await mailing.wait.aenqueue(0.01, fails=fails)).id for fails in (False, True)]

    ids = asyncio.run(enqueue())
    done, failed = outcomes(collected_events)
    assert (done, noted) == (Ack(), ids)
    assert "no time" in failed.reason
    finished = [result for name, _, result in sent if name == "task_finished"]
    assert [result.status for result in finished] == ["SUCCESSFUL", "FAILED"]
    assert finished[0]._return_value == {1: "slept"}
    assert finished[1].errors[0].exception_class is LookupError


def test_results_in_a_test(collected_events: CollectedEvents, options: Any) -> None:
    options(retry=RetryPolicy(max_attempts=2, delay=0))
    called = mailing.send.enqueue("ann", options={"cc": ["bob"]})
    failing = mailing.fail.enqueue("lost")
    assert tasks.default_task_backend.supports_get_result
    with pytest.raises(DoesNotExist):
        mailing.send.get_result(called.id)
    outcomes(collected_events)
    result = mailing.send.get_result(called.id)
    assert (result.status, result.return_value) == ("SUCCESSFUL", "sent to ann")
    assert (result.args, result.kwargs) == (["ann"], {"options": {"cc": ["bob"]}})
    assert (result.task, result.attempts, result.errors) == (mailing.send, 1, [])
    assert result.started_at <= result.finished_at
    called.refresh()
    assert called.return_value == "sent to ann"
    failing.refresh()
    assert (failing.status, failing.is_finished) == ("READY", False)
    collected_events.deliver_all(raise_errors=False)
    failing.refresh()
    assert (failing.status, failing.attempts) == ("FAILED", 2)
    [error] = failing.errors
    assert error.exception_class is LookupError
    assert "LookupError: lost" in error.traceback
    with pytest.raises(Mismatch):
        mailing.send.get_result(failing.id)
    with pytest.raises(DoesNotExist):
        mailing.send.get_result("no such task")


def test_results_in_a_database(tmp_path: Path, outbox_setting: Any) -> None:
    url = f"sqlite:///{tmp_path / 'results.db'}"
    assert not tasks.default_task_backend.supports_get_result
    with pytest.raises(NotImplementedError):
        mailing.wait.get_result("a")
    outbox_setting(RESULTS=url)
    broker = f"sqlite:///{tmp_path / 'broker.db'}"
    with Publisher(broker, results=url) as publisher:
        worker = Worker(load(["tests.django.shop.mailing"]), publisher=publisher, threads=1)
        worker.start()
        collector = EventCollector(publisher=publisher)
        for name, id_ in (("wait", "a"), ("other", "b"), ("fail", "c")):
            headers = {TASK: f"tests.django.shop.mailing:{name}"}
            collector.enqueue_event(
                {"args": ["0.5"] if name == "fail" else [0.5]},
                "tasks",
                exchange="",
                headers=headers,
                id=id_,
                using=None,
            )
        wait_until(lambda: backend_has("a"))
        running = asyncio.run(mailing.wait.aget_result("a"))
        assert running.status in ("RUNNING", "SUCCESSFUL")
        wait_until(lambda: mailing.wait.get_result("a").is_finished)
        done = mailing.wait.get_result("a")
        assert done.return_value == {"1": "slept"}
        assert done.enqueued_at <= done.started_at <= done.last_attempted_at <= done.finished_at
        wait_until(lambda: backend_has("c") and mailing.fail.get_result("c").is_finished)
        assert mailing.fail.get_result("c").errors[0].exception_class is LookupError
        assert worker.stop(10)
    assert not backend_has("b")


def backend_has(id_: str) -> bool:
    try:
        tasks.default_task_backend.get_result(id_)
    except DoesNotExist:
        return False
    return True


def test_an_attempt_that_was_given_up_is_over(
    tmp_path: Path, options: Any, sent: list[Any]
) -> None:
    options(timeout=0.2)
    # A worker, since nothing else looks at the time limit of a plain function.
    with Publisher(f"sqlite:///{tmp_path / 'broker.db'}") as publisher:
        worker = Worker(load(["tests.django.shop.mailing"]), publisher=publisher, threads=1)
        worker.start()
        collector = EventCollector(publisher=publisher)
        headers = {TASK: "tests.django.shop.mailing:doze"}
        collector.enqueue_event({"args": [0.8]}, "tasks", exchange="", headers=headers, using=None)
        wait_until(lambda: noted == ["awake"])
        assert worker.stop(10)
    assert [name for name, _, _ in sent] == ["task_started", "task_finished"]
    [error] = sent[-1][2].errors
    assert error.exception_class_path == "outbox.consumers.outcome.ProcessTimeout"


def test_a_task_may_be_deferred(collected_events: CollectedEvents) -> None:
    at = timezone.now() + datetime.timedelta(days=2)
    mailing.send.using(run_after=at).enqueue("a")
    [event] = StoredEvent.objects.all()
    assert event.available_at == at
    with override_settings(USE_TZ=False):
        mailing.send.using(run_after=datetime.datetime(2031, 1, 1, 12)).enqueue("b")
    local = timezone.make_aware(datetime.datetime(2031, 1, 1, 12))
    assert StoredEvent.objects.order_by("seq").last().available_at == local
    with pytest.raises(InvalidTask, match="must be an aware datetime"):
        mailing.send.using(run_after=datetime.datetime(2031, 1, 1, 12))


def test_queues_are_those_of_the_backend(collected_events: CollectedEvents) -> None:
    mailing.log.enqueue()
    mailing.send.using(queue_name="mails").enqueue("a")
    mailing.send.enqueue("b")
    targets = list(StoredEvent.objects.order_by("seq").values_list("target", flat=True))
    assert targets == ["mails", "mails", "tasks"]
    assert outcomes(collected_events) == [Ack()] * 3
    with pytest.raises(InvalidTask, match="Queue 'other' is not valid for backend"):
        mailing.send.using(queue_name="other")
    queues = {consumer.queue for consumer in load(["tests.django.shop.mailing"])}
    assert queues == {"tasks", "mails"}


def test_the_signals_have_the_task_as_it_was_called(collected_events: CollectedEvents) -> None:
    seen: list[Any] = []

    def receive(task_result: Any, **_: Any) -> None:
        seen.append((task_result.task.queue_name, task_result.task.backend))

    tasks.signals.task_started.connect(receive)
    try:
        mailing.send.using(queue_name="mails").enqueue("a")
        mailing.now.using(backend="default").enqueue("b")
        outcomes(collected_events)
    finally:
        tasks.signals.task_started.disconnect(receive)
    assert sorted(seen) == [("default", "default"), ("mails", "default")]
    assert "b" in noted


def test_priorities_are_refused_where_the_queue_has_none(outbox_setting: Any) -> None:
    outbox_setting(URL="amqp://127.0.0.1:9")
    with pytest.raises(InvalidTask, match="does not support setting priority"):
        mailing.send.using(priority=7)
    outbox_setting(URL="amqp://127.0.0.1:9", TASKS_MAX_PRIORITY=9)
    mailing.send.using(priority=7)
    outbox_setting(URL="memory://", AFTER_COMMIT="nothing")
    for priority, expected in ((-100, 0), (0, 4), (1, 5), (100, 9)):
        mailing.send.using(priority=priority).enqueue("a")
        assert StoredEvent.objects.order_by("seq").last().priority == expected


def test_attributes_of_a_task_win_over_the_options(options: Any) -> None:
    options(timeout=5, deduplicate=True)
    backend = tasks.default_task_backend
    made = backend.adapted(mailing.send).task
    assert (made.timeout, made.deduplicate, made.retry) == (5, True, None)
    assert not backend.adapted(
        dataclasses.replace(mailing.send, keep_result=False)
    ).task.keep_result
    own = dataclasses.replace(mailing.send, timeout=9, deduplicate=False)
    made = backend.adapted(own).task
    assert (made.timeout, made.deduplicate) == (9, False)
    assert own.using(priority=0).timeout == 9


def test_what_no_worker_could_call_is_an_invalid_task() -> None:
    def _hidden() -> None: ...

    _hidden.__module__, _hidden.__qualname__ = mailing.__name__, "_hidden"
    with pytest.raises(InvalidTask, match="isn't public"):
        tasks.task(_hidden)


def test_the_checks_name_what_is_wrong(options: Any) -> None:
    call_command("check")
    options(retries=1)
    [error] = [each for each in checks.run_checks() if each.id == "outbox.E009"]
    assert error.hint == "Do you mean 'retry'?"
    with override_settings(INSTALLED_APPS=[]):
        assert "outbox.E008" in [each.id for each in tasks.default_task_backend.check()]


def test_a_worker_runs_tasks_that_are_named_one_by_one() -> None:
    [*consumers] = load(["tests.django.shop.mailing:send"])
    assert {consumer.queue for consumer in consumers} == {"tasks", "mails"}
