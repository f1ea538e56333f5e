"""Calling tasks: what is collected, what is refused in the caller's line, what a handle knows."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import functools
import pickle
import sys
import uuid
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy.orm import make_transient_to_detached, sessionmaker

from outbox import Event, InvalidEvent, UsageError, auto_publishing, configure, enqueue_event
from outbox.consumers import RetryPolicy
from outbox.consumers.discovery import load
from outbox.results.result_row import cut
from outbox.tasks import NoResults, Task, TaskHandle, later, options, schedule, task
from outbox.tasks.codec import codec_of, is_plain, is_same
from tests import greeting, shipping
from tests.shipping import Box, Colour, Newsletter, Order, Parcel


@pytest.fixture(autouse=True)
def publisher() -> Any:
    return configure("memory://", task_session=sessionmaker())


def called(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Event:
    """Return the event of a call."""
    with auto_publishing(independent=True) as block:
        later(call, *args, **kwargs)
        [event] = block.events
        block.clear_events()
    return event


def made(source: str, monkeypatch: pytest.MonkeyPatch, name: str = "made_module") -> ModuleType:
    """Return a module with this source, imported under a name for the test alone."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile("from outbox.tasks import task\n" + source, name, "exec"), vars(module))
    return module


# ------------------------------------------------------------------------ what is sent


def test_a_call_is_an_event_to_the_queue_of_tasks() -> None:
    event = called(shipping.greet, 17)
    assert (event.exchange, event.target, event.priority) == ("", "tasks", 5)
    assert event.payload == {"args": [17]}
    assert event.headers == {"outbox-task": "tests.shipping:greet"}


def test_calls_of_tasks_and_of_functions_are_the_same() -> None:
    for call in (shipping.greet, shipping.greet.function):
        assert called(call, 1).headers == {"outbox-task": "tests.shipping:greet"}
    assert shipping.greet(3) == "hello"
    with auto_publishing() as block:
        shipping.greet.later(1, text="x")
        assert block.events[0].payload == {"args": [1], "kwargs": {"text": "x"}}


def test_a_functions_own_keywords_are_its_own() -> None:
    event = called(Newsletter.deliver_all, at="noon", delay=4)
    assert event.payload == {"args": [], "kwargs": {"at": "noon", "delay": 4}}
    assert event.deliver_at is None


def test_options_are_checked_where_they_are_given() -> None:
    at = datetime.datetime(2040, 1, 1, tzinfo=datetime.UTC)
    with auto_publishing() as block:
        shipping.greet.options(
            at=at, priority=0, queue="mail", key="k", id="i", headers={"h": 1}
        ).later(1)
        [event] = block.events
        block.clear_events()
    assert (event.deliver_at, event.priority, event.target) == (at, 0, "mail")
    assert (event.key, event.id, event.headers["h"]) == ("k", "i", 1)
    for wrong, reason in (
        ({"priority": 10}, "0 to 9"),
        ({"priority": True}, "0 to 9"),
        ({"at": datetime.datetime(2040, 1, 1)}, "time zone"),
        ({"at": 5}, "timedelta from now"),
        ({"at": at, "delay": 5}, "not both"),
        ({"eta": 5}, "no option"),
        ({"queue": "x" * 251}, "250 bytes"),
        ({"id": "order\n17"}, r"the id 'order\\n17' .* isn't printable"),
        ({"id": "17\xa0"}, "isn't printable"),
    ):
        with pytest.raises(InvalidEvent, match=reason):
            options(**wrong)
    with pytest.raises(InvalidEvent, match="timedelta from now"):
        schedule("tomorrow", shipping.greet, 1)  # type: ignore[arg-type]


def test_a_failed_block_calls_nothing() -> None:
    handles = []
    with pytest.raises(ZeroDivisionError), auto_publishing():
        handles.append(shipping.greet.later(1))
        raise ZeroDivisionError
    [handle] = handles
    assert (handle.status, handle.cancel()) == ("dropped", True)
    with pytest.raises(UsageError, match="dropped with its unit of work"):
        handle.result()


# ------------------------------------------------------------------------ arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    price: decimal.Decimal


class Level(enum.StrEnum):
    LOW = "low"


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Node:
    name: str
    children: list[Node] = dataclasses.field(default_factory=list)


UTC = datetime.UTC
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
EAST = datetime.timezone(datetime.timedelta(hours=1))
VALUES: list[tuple[Any, Any]] = [
    (datetime.datetime, datetime.datetime(2030, 1, 1, 12, 30, 0, 7)),
    (datetime.datetime, datetime.datetime(2030, 1, 1, tzinfo=UTC)),
    (datetime.date | None, datetime.date(2030, 1, 1)),
    (datetime.time, datetime.time(1, 2, 3)),
    (datetime.time, datetime.time(1, 2, 3, tzinfo=UTC)),
    (set[datetime.time], {datetime.time(1, 2, tzinfo=UTC)}),
    (datetime.timedelta, datetime.timedelta(days=-1, microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.50")),
    (bytes, b"\x00\xff"),
    (set[int], {1, 2}),
    (tuple[int, ...], (1, 2)),
    (tuple[int, str], (1, "a")),
    (dict[int, datetime.date], {1: datetime.date(2030, 1, 1)}),
    (list[Colour], [Colour.RED]),
    (Flags, Flags.A | Flags.B),
    (Level, Level.LOW),
    (Node, Node("a", [Node("b")])),
    (Box, Box(decimal.Decimal("2.0"), datetime.datetime(2030, 1, 1, tzinfo=UTC))),
]


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=lambda one: str(one)[:40])
def test_a_value_comes_back_by_its_annotation(annotation: Any, value: Any) -> None:
    codec = codec_of(annotation)
    encoded = codec.encode(value)
    assert is_plain(encoded)
    assert is_same(codec.decode(encoded), value)


class Loose:
    pass


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("value", datetime.date(2030, 1, 1), "needs a parameter whose annotation"),
        ("value: object", datetime.date(2030, 1, 1), "needs a parameter whose annotation"),
        ("value: str | date", datetime.date(2030, 1, 1), "brings it back as '2030-01-01'"),
        ("value: date", datetime.datetime(2030, 1, 1), "it is a datetime"),
        ("value: datetime", datetime.datetime(2030, 1, 1, fold=1), "brings it back"),
        ("value: set[datetime]", {datetime.datetime(2030, 1, 1, fold=1)}, "brings it back"),
        ("value: time", datetime.time(2, 30, fold=1), "brings it back"),
        ("value: time", datetime.time(2, 30, tzinfo=BERLIN), "brings it back"),
        ("value: list[time]", [datetime.time(2, 30, tzinfo=BERLIN)], "brings it back"),
        ("value: Decimal", decimal.Decimal("NaN"), "it is not a number"),
        ("value: Decimal", decimal.Decimal("sNaN"), "it is not a number"),
        ("value: datetime", datetime.datetime.min.replace(tzinfo=EAST), "out of range"),
        ("value: str", Level.LOW, "it is a Level"),
        ("value: dict", {1: 2, "1": 3, 2: Loose()}, "needs a parameter whose annotation"),
        ("value: list", (1, 2), "it is a tuple"),
        ("value: list[int]", [datetime.date(2030, 1, 1)], "it is a date, not a int"),
        ("value: int", Loose(), "it is a Loose"),
        ("value", {"$instance": ["os:system", [1]]}, "needs a parameter whose annotation"),
        ("value: Loose", Loose(), "can't be carried"),
    ],
)
def test_what_would_arrive_changed_is_refused(
    source: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(
        "from datetime import date, datetime, time\nfrom decimal import Decimal\n"
        "from tests.unit.test_tasks import Loose\n"
        f"def call({source}): ...",
        monkeypatch,
    )
    with pytest.raises(InvalidEvent, match="the argument 'value' of made_module:call") as caught:
        called(module.call, value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "n: int\n    def __post_init__(self): self.n *= 2",
        "n: int\n    def __init__(self, n): self.n = 2 * n",
        "n: int\n    def __setattr__(self, name, value): object.__setattr__(self, name, 2 * value)",
        "n: int\n    more: InitVar[int] = 0\n    def __post_init__(self, more): self.n *= 2",
        "n: int\n    made: int = field(init=False)\n"
        "    def __post_init__(self): self.made = id(self)",
    ],
    ids=["post_init", "init", "setattr", "init variable", "made"],
)
def test_a_dataclass_that_code_of_its_own_would_change_is_refused(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(
        "from dataclasses import InitVar, dataclass, field\n"
        f"@dataclass\nclass Thing:\n    {body}\n"
        "class Heir(Thing): ...\n"
        "def call(value: Thing): ...\ndef inherit(value: Heir): ...",
        monkeypatch,
    )
    for function, kind in ((module.call, module.Thing), (module.inherit, module.Heir)):
        with pytest.raises(InvalidEvent, match="brings it back"):
            called(function, kind(1))


def test_only_what_may_come_back_changed_is_compared() -> None:
    codec = codec_of(Point)
    assert codec.is_exact(Point(1, decimal.Decimal("1.50")))
    assert codec.decode(codec.encode(Point(1, decimal.Decimal("1.50")))) == Point(
        1, decimal.Decimal("1.50")
    )
    assert not codec_of(Box).is_exact(
        Box(decimal.Decimal(1), datetime.datetime(2030, 1, 1, fold=1))
    )


@pytest.mark.parametrize(
    "value", [1, "a", 1.5, None, True, [1, {"a": [None]}], {"a": {"b": [1, "c"]}}]
)
def test_plain_values_are_neither_checked_nor_converted(value: Any) -> None:
    assert called(shipping.doubtful, value).payload == {"args": [value]}


def test_arguments_that_do_not_fit_are_refused() -> None:
    for args, kwargs in (((), {}), ((1, "a", 3), {}), ((1,), {"other": 1})):
        with pytest.raises(InvalidEvent, match=r"greet\(number: .*don't fit"):
            called(shipping.greet, *args, **kwargs)
    with pytest.raises(InvalidEvent, match=r"NaN|not JSON compliant"):
        called(shipping.greet, float("nan"))
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(InvalidEvent, match="contains itself"):
        called(shipping.doubtful, nested)


def test_pydantic_models_travel_by_their_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    pydantic = pytest.importorskip("pydantic")
    module = made(
        "import pydantic\nclass Model(pydantic.BaseModel):\n"
        "    number: int = pydantic.Field(1, alias='al')\n"
        "def call(model: Model): ...",
        monkeypatch,
    )
    assert issubclass(module.Model, pydantic.BaseModel)
    event = called(module.call, module.Model(al=3))
    assert event.payload == {"args": [{"al": 3}], "typed": [0]}


def test_a_pydantic_model_whose_field_would_arrive_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pydantic")
    module = made(
        "import datetime, pydantic\nclass Model(pydantic.BaseModel):\n"
        "    at: datetime.datetime\n"
        "def call(model: Model): ...",
        monkeypatch,
    )
    called(module.call, module.Model(at=datetime.datetime(2030, 10, 27, 2, 30)))
    with pytest.raises(InvalidEvent, match="brings it back"):
        called(module.call, module.Model(at=datetime.datetime(2030, 10, 27, 2, 30, fold=1)))


def test_a_key_that_its_type_does_not_bring_back_is_refused() -> None:
    parcel = Parcel(id=uuid.uuid4(), serial=shipping.Serial("a-b", 1), state="new")
    make_transient_to_detached(parcel)
    with pytest.raises(InvalidEvent, match=r"the Parcel, with .*a-b.* its type SerialText"):
        called(parcel.send)


@pytest.mark.one_python
def test_dates_travel_where_a_test_has_frozen_the_time() -> None:
    import freezegun

    with freezegun.freeze_time("2030-01-01"):
        day = datetime.date.today()
        event = called(shipping.carry, day, [Box(decimal.Decimal(1), datetime.datetime.now(UTC))])
        assert event.payload["args"][0] == "2030-01-01"
        for kind in (datetime.datetime, datetime.date):
            assert codec_of(kind) is not None


# ------------------------------------------------------------------------ what can't be called


def test_what_no_worker_could_call_is_refused_in_the_callers_line() -> None:
    def local() -> None: ...

    cases: list[tuple[Any, str]] = [
        (local, "local to a function"),
        (lambda: None, "local to a function"),
        (functools.partial(shipping.plain, 1), "give later\\(\\) the function itself"),
        (len, "isn't a function"),
        ([].append, "isn't a function"),
        (Newsletter().personal, "isn't an instance of a mapped class"),
        (Newsletter, "isn't a function"),
        (Order(id=1).ship, "has no row yet"),
        (Order._secret, "isn't public"),
        (7, "isn't a function"),
    ]
    for call, reason in cases:
        with pytest.raises(UsageError, match=reason):
            later(call)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f():\n    def g(): ...\n    return task(g)\nf()", "local to a function"),
        ("class C:\n    @task\n    def m(self): ...", "is in a class"),
        ("@task\ndef f():\n    yield", "has a yield"),
        ("@task(priority=12)\ndef f(): ...", "0 to 9"),
        ("@task(queue='')\ndef f(): ...", "queue is ''"),
        ("@task(name='a b')\ndef f(): ...", "without spaces"),
        ("@task(aliases='abc')\ndef f(): ...", "not a list"),
        ("@task(retry=3)\ndef f(): ...", "not a RetryPolicy"),
        ("@task(consumer=int)\ndef f(): ...", "not a class derived from"),
        ("@task(max_priority=3)\ndef f(): ...", "name one with queue="),
        (
            "@task(name='n')\ndef f(): ...\n@task(name='n')\ndef g(): ...",
            "two tasks have the name 'n'",
        ),
        (
            "@task(queue='q1', max_priority=3)\ndef f(): ...\n"
            "@task(queue='q1', max_priority=4)\ndef g(): ...",
            "is 4, and 3 elsewhere",
        ),
        ("task(len)", "needs a function of a module"),
    ],
)
def test_a_wrong_task_is_refused_at_the_decorator(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=reason):
        made(source, monkeypatch)


def test_a_name_for_the_type_checker_alone_is_refused_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = made("@task\ndef f(value: 'Missing'): ...", monkeypatch)
    with pytest.raises(UsageError, match="don't import it under TYPE_CHECKING alone"):
        module.f.later(1)


def test_a_task_of_the_program_itself_gets_the_name_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    program = "import outbox\nfrom outbox.tasks import task\n@task\ndef f(): ...\nprint(f.name)\n"
    (tmp_path / "shop.py").write_text(program)

    def printed(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=20,
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        return (done.stdout + done.stderr).strip().splitlines()[-1]

    assert printed("shop.py") == "shop:f"
    assert printed("-m", "shop") == "shop:f"
    assert "move it to a module" in printed("-c", program)


# ------------------------------------------------------------------------ handles


def test_a_handle_knows_its_unit_of_work() -> None:
    with auto_publishing() as outer:
        first = shipping.greet.later(1)
        with auto_publishing():
            inner = shipping.greet.later(2)
            assert inner.status == "collected"
        enqueue_event({}, "other")
        assert (first.status, inner.status) == ("collected", "collected")
        with pytest.raises(UsageError, match="publish\\(\\) first"):
            inner.result()
        assert inner.cancel()
        assert inner.status == "dropped"
        assert [event.target for event in outer.events] == ["tasks", "other"]
    assert first.status == "unknown"
    with pytest.raises(NoResults, match="is not kept"):
        first.result()
    with pytest.raises(NoResults, match="can't be cancelled"):
        first.cancel()


def test_a_handle_waits_on_no_event_loop() -> None:
    async def act() -> None:
        handle: TaskHandle[Any] = TaskHandle("1")
        with pytest.raises(UsageError, match="await result_async"):
            handle.result()
        with pytest.raises(NoResults):
            await handle.result_async()

    asyncio.run(act())


def test_a_handle_travels_as_its_id() -> None:
    with auto_publishing() as block:
        handle = shipping.greet.later(1)
        again = pickle.loads(pickle.dumps(handle))
        assert (again, again.id, hash(again)) == (handle, handle.id, hash(handle))
        block.clear_events()
    assert handle.status == "dropped"
    assert handle != handle.id


# ------------------------------------------------------------------------ what a worker loads


def test_a_worker_has_one_consumer_for_each_queue_of_its_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made(
        "@task(queue='mail', max_priority=9)\ndef f(): ...\n@task\ndef g(): ...",
        monkeypatch,
    )
    consumers = {one.queue: one for one in load(["made_module"])}
    assert list(consumers) == ["mail", "tasks"]
    mail, tasks = (consumers[name].spec("outbox") for name in ("mail", "tasks"))
    assert (mail.queue_type, mail.max_priority, mail.exchange) == ("classic", 9, "")
    assert (tasks.queue_type, tasks.max_priority) == ("quorum", None)
    configure("memory://", tasks_max_priority=9, tasks_queue="own")
    [own] = [one for one in load(["made_module"]) if one.queue == "own"]
    assert own.spec("outbox").max_priority == 9


def test_undecorated_code_is_called_unless_that_is_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names() -> set[str]:
        [queue] = load(["tests.shipping"])
        return set(queue._table.entries)  # type: ignore[attr-defined]

    known = names()
    assert {
        "tests.shipping:plain",
        "tests.shipping:Newsletter.deliver_all",
        "tests.shipping:Weekly.render",
        "tests.shipping:Special.ship",
        "tests.shipping:Special.lose",
        "shipping.keep",
        "old.module:keep",
    } <= known
    monkeypatch.setenv("OUTBOX_TASKS_ONLY_DECORATED", "1")
    assert all(isinstance(getattr(shipping, name.partition(":")[2], None), Task) for name in
               names() - {"shipping.keep", "old.module:keep"})  # fmt: skip
    monkeypatch.setenv("OUTBOX_TASKS_ONLY_DECORATED", "yes")
    with pytest.raises(UsageError, match="not 1 or 0"):
        names()


def test_a_module_without_tasks_is_named_with_what_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made("def f(): ...\nclass C:\n    @classmethod\n    def m(cls): ...\n", monkeypatch, "bare")
    with pytest.raises(UsageError, match="no consumer and no task"):
        load(["bare"])
    for name in ("bare:f", "bare:C"):
        [queue] = load([name])
        assert set(queue._table.entries) == {"bare:f", "bare:C.m"}  # type: ignore[attr-defined]
    [queue] = load(["bare", "tests.greeting"])
    assert "bare:f" in queue._table.entries  # type: ignore[attr-defined]
    assert greeting.goodbye.name in queue._table.entries  # type: ignore[attr-defined]


def test_a_tasks_own_attributes_reach_its_consumer() -> None:
    [queue] = load(["tests.shipping"])
    consumers = queue._consumers  # type: ignore[attr-defined]
    fails, slow = (consumers[f"tests.shipping:{name}"] for name in ("fails", "slow"))
    assert fails.retry == RetryPolicy(max_attempts=2, delay=0.01)
    assert (slow.time_limit, slow.is_async, fails.is_async) == (0.1, True, False)
    assert fails.auto_publish
    assert task is not None


def test_every_database_can_hold_what_is_kept_of_an_exception() -> None:
    assert cut("a\0b\udc00") == "a\\0b?"
    assert cut("x" * 100_000) == "x" * 65_536 + "..."
