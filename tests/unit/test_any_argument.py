"""Any URL, setting, header, time or topic is accepted or refused."""

from __future__ import annotations

import datetime
import enum
import json
import math
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pika
import pika.data
import pika.frame
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outbox import Event, EventCollector, InvalidEvent, Publisher, UsageError
from outbox.event import make_event
from outbox.header_values import MAX_HEADER_BYTES, plain_table
from outbox.messages.rows import event_of, values_of
from outbox.messages.topics import matches
from outbox.serializer import JSONSerializer
from outbox.settings import Settings
from outbox.sql import Store
from outbox.storage.engines import open_engine
from outbox.transports.memory import MemoryTransport
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.url import SCHEMES, BrokerURL
from tests.amqp import properties_of_event

anything = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
text = st.text(max_size=20)

# ------------------------------------------------------------------------------ URLs

parts = st.sampled_from(
    [*":@/?#,[]%=&é", "%ff", "%00", "host", "host:", "::1", "9" * 5_000, "\ud800"]
)
urls = anything | st.builds(
    lambda scheme, rest: f"{scheme}://{''.join(rest)}",
    st.sampled_from(SCHEMES),
    st.lists(parts | parts | anything, max_size=8) | parts.map(lambda part: ["host:", part]),
)
escapes = st.text(max_size=9) | st.sampled_from(["%41", "100%", "a%2Fb", "+", "é/@:?#"])
names_in_urls = escapes.filter(lambda one: "\0" not in one)


@given(urls)
def test_any_url_is_parsed_or_refused(url: str) -> None:
    try:
        parsed = BrokerURL.parse(url)
    except UsageError:
        return
    assert f"{parsed} {parsed!r}".encode()
    if parsed.scheme.startswith("amqp"):
        assert all(host and 0 < port < 65_536 for host, port in parsed.hosts)


@given(
    st.sampled_from(["amqp", "amqps"]),
    names_in_urls,
    names_in_urls,
    names_in_urls.filter(bool),
    st.lists(
        st.tuples(st.from_regex(r"[a-z0-9.-]+", fullmatch=True), st.integers(1, 65_535)),
        min_size=1,
        max_size=3,
    ),
)
def test_percent_encoded_parts_of_a_url_are_decoded(
    scheme: str, user: str, password: str, vhost: str, hosts: list[tuple[str, int]]
) -> None:
    encoded = [quote(one, safe="") for one in (user, password, vhost)]
    address = ",".join(f"{host}:{port}" for host, port in hosts)
    parsed = BrokerURL.parse(f"{scheme}://{encoded[0]}:{encoded[1]}@{address}/{encoded[2]}")
    assert (parsed.user, parsed.password, parsed.vhost) == (user, password, vhost)
    assert parsed.hosts == tuple(hosts)
    shown = BrokerURL.parse(str(parsed))
    assert (shown.user, shown.vhost, shown.hosts) == (user, vhost, tuple(hosts))


@given(
    st.sampled_from(["amqp", "amqps", "AMQP", "http", ""]),
    st.lists(st.sampled_from([*":@/?#%,[]=&", "%2F", " "]), max_size=6),
    st.sampled_from(["@host/vhost", "@", "@host:port", "@a,,b", "@host?a=b", "@[::1", "=x@host"]),
)
def test_a_password_is_never_shown_encoded_or_not(
    scheme: str, around: list[str], rest: str
) -> None:
    password = f"{''.join(around)}hunter2"
    try:
        url = BrokerURL.parse(f"{scheme}://user:{password}{rest}")
        shown = f"{url!r} {url}"
        connection_parameters(url, Settings(), "publisher")
    except UsageError as error:
        shown = str(error)
    assert "hunter2" not in shown


# -------------------------------------------------------------------------- settings

SETTINGS = list(Settings.__dataclass_fields__)
NUMBERS = [name for name in SETTINGS if isinstance(getattr(Settings(), name), int | float)]
numbers = st.integers() | st.floats() | st.sampled_from([math.nan, math.inf, -0.0, 1e9, 1e10])
odd = st.sampled_from([[], "\udcff"])  # as the environment has bytes that are not UTF-8
values: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | anything | st.binary() | odd
)
chosen = (
    st.tuples(st.sampled_from(NUMBERS), numbers)
    | st.tuples(st.sampled_from(SETTINGS), values)
    | st.tuples(text, values)
)


@given(chosen, st.booleans())
def test_any_setting_is_parsed_or_refused(setting: tuple[str, Any], from_environment: bool) -> None:
    name, given_value = setting
    in_code = {} if from_environment else {name: given_value}
    in_environment = {f"OUTBOX_{name.upper()}": str(given_value)} if from_environment else {}
    try:
        found = Settings.load(None, in_code, in_environment)
    except UsageError:
        return
    for one in SETTINGS:
        value, default = getattr(found, one), getattr(Settings(), one)
        if isinstance(default, int | float):
            assert math.isfinite(value)
            assert 0 <= value <= threading.TIMEOUT_MAX or isinstance(default, int)
        elif isinstance(default, str):
            assert len(value.encode()) <= 255


# --------------------------------------------------------------------------- headers


class Colour(enum.Enum):
    RED = "red"


names = st.text(max_size=8) | st.sampled_from(["$bytes", "$table", "outbox-key", "CC", "X-Opt-a"])
carried = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from([-(2**31) - 1, -(2**31), 2**31 - 1, 2**31, -(2**63), 2**63 - 1])
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
given_by_users = st.recursive(
    carried
    | st.integers()
    | st.floats()
    | anything
    | st.decimals()
    | st.uuids()
    | st.datetimes()
    | st.just(Colour.RED)
    | st.builds(object)
    | st.binary(max_size=5).map(lambda data: memoryview(data)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(names | anything | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def read_by_pika(frames: bytes) -> tuple[Any, Any, bytes]:
    """Return the method, the properties and the body of a published message."""
    found: list[Any] = []
    while frames:
        size, frame = pika.frame.decode_frame(frames)
        found.append(frame)
        frames = frames[size:]
    method, header, *bodies = found
    return method.method, header.properties, b"".join(one.fragment for one in bodies)


@given(st.dictionaries(names | anything, given_by_users, max_size=4))
def test_any_headers_are_refused_or_arrive_intact(headers: dict[Any, Any]) -> None:
    with Publisher("memory://") as publisher:
        collector = EventCollector(publisher=publisher)
        try:
            event = collector.enqueue_event({}, "x", headers=headers)
        except InvalidEvent:
            assert len(collector) == 0
            return
        collector.publish()
        transport = publisher._own
        assert isinstance(transport, MemoryTransport)
        [published] = transport.published
    assert published.headers == event.headers
    plain, size = plain_table(event.headers, "headers")
    assert plain == event.headers
    _, properties, _ = read_by_pika(Encoder().encode(event))
    found = {name: value for name, value in properties.headers.items() if name in event.headers}
    assert found == event.headers
    assert encoded_size(event) <= size <= MAX_HEADER_BYTES


def encoded_size(event: Event) -> int:
    pieces: list[bytes] = []
    return pika.data.encode_table(pieces, dict(event.headers)) if event.headers else 4


@given(st.dictionaries(text, carried, max_size=4))
def test_valid_headers_arrive_unchanged(headers: dict[str, Any]) -> None:
    assert plain_table(headers, "headers")[0] == headers


# ------------------------------------------------------------------- encoding, and storing

addresses = st.text(min_size=1, max_size=20)
events = st.builds(
    Event,
    id=addresses,
    target=addresses,
    exchange=text,
    body=st.binary(max_size=30) | st.integers(4_000, 9_000).map(bytes),
    content_type=st.just("application/json") | text,
    headers=st.dictionaries(text, carried, max_size=3),
    priority=st.none() | st.integers(0, 255),
    key=st.none() | text,
    occurred_at=st.datetimes(  # until SQLite's seconds leave no room for microseconds
        min_value=datetime.datetime(1970, 1, 1),
        max_value=datetime.datetime(2242, 1, 1),
        timezones=st.just(datetime.UTC),
    ),
    unroutable=st.sampled_from([None, "park", "fail", "ignore"]),
)


@given(st.lists(events, max_size=3), st.sampled_from([4_096, 131_072]), st.text(max_size=9))
def test_any_event_is_encoded_as_pika_would_encode_it(
    chunk: list[Event], frame_max: int, app: str
) -> None:
    encoder = Encoder(app, frame_max)
    for event in chunk:
        method, properties, body = read_by_pika(encoder.encode(event))
        assert (method.exchange, method.routing_key) == (event.exchange, event.target)
        assert method.mandatory
        assert properties == properties_of_event(event, app)
        assert body == event.body


class Row:
    """A row as the database returns it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


@given(events)
def test_any_event_is_restored_from_its_row(event: Event) -> None:
    assert event_of(Row(values_of(event))) == event


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    engine = open_engine(f"sqlite:///{tmp_path_factory.mktemp('any')}/events.db")
    found = Store(engine)
    found.create()
    yield found
    engine.dispose()


@settings(max_examples=settings().max_examples // 4)  # each is some commits to a disk
@given(st.lists(events, max_size=5))
def test_any_events_are_read_from_a_file_in_order(store: Store, stored: list[Event]) -> None:
    store.put(stored)
    rows = store.claim(10)
    assert [row.event for row in rows] == stored
    store.complete(rows)


json_values = st.recursive(
    st.none() | st.integers() | st.floats() | anything | st.fixed_dictionaries({"$bytes": text}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
headers_of_others = (
    st.none()
    | anything
    | json_values.map(json.dumps)
    | st.dictionaries(names, json_values, max_size=3).map(json.dumps)
    | st.integers(0, 2_000).map(lambda depth: '{"a":' + "[" * depth + "]" * depth + "}")
)


@given(
    st.fixed_dictionaries(
        {
            "id": anything | st.integers(),
            "type": anything,
            "exchange": anything,
            "content_type": anything,
            "key": st.none() | anything,
            "payload": st.binary() | anything | st.floats() | st.integers(0, 10**12),
            "headers": headers_of_others,
        }
    )
)
def test_a_row_of_another_program_is_an_event_or_a_value_error(row: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    try:
        event = event_of(Row({**row, "priority": None, "occurred_at": now, "unroutable": None}))
    except ValueError:
        return
    assert Encoder().encode(event)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("payload", 10**12, "the payload is a int"),
        ("headers", '{"a": ' + "[" * 5_000 + "]" * 5_000 + "}", "nested too deeply"),
        ("headers", '{"a": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
    ],
)
def test_a_malformed_row_of_another_program_is_reported(
    column: str, value: Any, expected: str
) -> None:
    row = Row({**values_of(Event("1", "x", "", b"{}")), column: value})
    with pytest.raises(ValueError, match=expected):
        event_of(row)


# ----------------------------------------------------------------------------- times

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
zones = (
    st.none()
    | st.timezones()
    | st.integers(-1_439, 1_439).map(
        lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes))
    )
)
times = st.datetimes(timezones=zones) | st.sampled_from(
    [datetime.datetime.max, datetime.datetime.min]
).flatmap(lambda at: zones.map(lambda zone: at.replace(tzinfo=zone)))
delays = (
    st.integers() | st.floats() | st.timedeltas() | st.decimals() | st.booleans() | text | st.none()
)


def event_with(**options: Any) -> Event:
    return make_event(JSONSerializer(), 100, None, {}, "x", "", **options)


@given(times)
def test_deliver_at_is_kept_to_the_microsecond_or_refused(at: datetime.datetime) -> None:
    try:
        event = event_with(deliver_at=at)
    except InvalidEvent:
        assert at.tzinfo is None or not 2 < at.year < 9_998
        return
    assert event.deliver_at is not None
    # By their distance: Python calls an hour that a clock shows twice equal to no other zone's.
    assert event.deliver_at - EPOCH == at - EPOCH
    assert event.deliver_at.utcoffset() == datetime.timedelta()


@given(delays)
def test_a_delay_is_kept_or_refused(delay: Any) -> None:
    try:
        event = event_with(delay=delay)
    except InvalidEvent:
        return
    span = (
        delay if isinstance(delay, datetime.timedelta) else datetime.timedelta(seconds=delay or 0)
    )
    expected = event.occurred_at + span if span else None
    assert event.deliver_at == expected


# ---------------------------------------------------------------------------- topics


def matches_by_the_book(pattern: list[str], target: list[str]) -> bool:
    match pattern:
        case []:
            return not target
        case ["#", *rest]:
            return matches_by_the_book(rest, target) or (
                bool(target) and matches_by_the_book(pattern, target[1:])
            )
        case [word, *rest]:
            fits = bool(target) and word in ("*", target[0])
            return fits and matches_by_the_book(rest, target[1:])
    return False


words = st.sampled_from(["a", "b", "ab", "", "a+", "\n", "é"])


@given(
    st.lists(words | st.sampled_from(["*", "#", "#"]), min_size=1, max_size=7),
    st.lists(words, min_size=1, max_size=7),
)
def test_topics_match_as_the_specification_says(pattern: list[str], target: list[str]) -> None:
    assume(pattern != [""] or target != [""])
    expected = matches_by_the_book(pattern, target)
    assert matches(".".join(pattern), ".".join(target)) is expected


@pytest.mark.timeout(10)
def test_a_pattern_of_many_hashes_costs_no_more_than_a_plain_one() -> None:
    target = ".".join("a" * 120)
    assert not matches("#.a." * 20 + "b", target)
    assert not matches("#." * 60 + "b", target)
    assert matches("#.a." * 20 + "#", target)
