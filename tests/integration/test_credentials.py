"""Credentials from a function: rotated passwords, and OAuth 2 tokens that expire."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import ConnectFailed, Credentials, Event, Publisher, UsageError
from outbox.consumers import Consumer, ReceivedEvent
from outbox.credentials import credentials_of
from outbox.doctor.broker_probe import BrokerProbe
from outbox.settings import Settings
from outbox.testing.broker import PrivateBroker
from outbox.transports.registry import open_parked_queues
from outbox.url import BrokerURL
from tests.places import events_for, working
from tests.waiting import wait_until


def without_user(url: str) -> str:
    return url.replace("guest:guest@", "")


@pytest.fixture
def user(private_broker: PrivateBroker, name: str) -> Iterator[str]:
    private_broker.ctl("add_user", name, "first")
    private_broker.ctl("set_permissions", name, ".*", ".*", ".*")
    yield name
    private_broker.ctl("delete_user", name)


def publish(publisher: Publisher, target: str) -> Event:
    [event] = events_for(publisher, [target], exchange="", unroutable="ignore")
    publisher.publish([event])
    return event


@pytest.mark.one_python
@pytest.mark.slow
def test_a_password_can_be_changed_under_publishers_and_workers(
    private_broker: PrivateBroker, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = {"password": "first"}
    threads: list[str] = []
    done: list[str] = []

    def credentials() -> tuple[str, str]:
        threads.append(threading.current_thread().name)
        return user, secret["password"]

    class Work(Consumer):
        queue = user

        def process(self, event: ReceivedEvent) -> None:
            done.append(event.id)

    url = without_user(private_broker.url)
    with Publisher(url, credentials=credentials, exchange=user) as publisher:
        with working(publisher, Work) as worker:
            wait_until(lambda: worker.is_consuming)
            before = publish(publisher, user)
            wait_until(lambda: before.id in done)
            private_broker.ctl("change_password", user, "second")
            private_broker.ctl("close_all_user_connections", user, "rotated")
            during = publish(publisher, user)
            wait_until(lambda: "refused the user or the password" in caplog.text)
            secret["password"] = "second"
            wait_until(lambda: during.id in done, 30)
    # The consumer tries over a connection apart whether its queue is to blame.
    links = {"outbox-publisher", "outbox-consumer"}
    assert links <= set(threads) <= {*links, "outbox-credentials"}
    assert "first" not in caplog.text
    assert "second" not in caplog.text
    # The commands as well.
    settings = Settings.load(url, {"credentials": credentials}, {})
    with open_parked_queues(settings) as parked:
        assert parked.count(f"{user}.dead") == 0


def test_what_the_function_raises_is_a_failed_attempt(
    amqp_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = [OSError("the vault\nis sealed"), 17, ("guest", "guest")]

    def credentials() -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    url = amqp_url.replace("guest:guest@", "nobody:nothing@")
    with Publisher(url, credentials=credentials, exchange=name) as publisher:
        publisher.make_ready()
        wait_until(lambda: publisher.connected)
    assert "no credentials: OSError: the vault\\nis sealed; retrying in" in caplog.text
    assert "credentials() has returned a int; return Credentials(...)" in caplog.text

    def fail() -> str:
        raise OSError("sealed")

    settings = Settings.load(url, {"credentials": fail}, {})
    with pytest.raises(ConnectFailed, match="no credentials: OSError: sealed"):
        open_parked_queues(settings).__enter__()
    with pytest.raises(ConnectFailed, match="no credentials: OSError: sealed"):
        BrokerProbe.open(BrokerURL.parse(url), settings)
    BrokerProbe.open(
        BrokerURL.parse(url), Settings.load(url, {"credentials": credentials}, {})
    ).close()


# ------------------------------------------------------------------------------------- tokens

KEY = b"a key that only the tests and the broker know"
ADVANCED = """[
  {rabbit, [
    {auth_backends, [rabbit_auth_backend_oauth2, rabbit_auth_backend_internal]},
    {channel_tick_interval, 200}
  ]},
  {rabbitmq_auth_backend_oauth2, [
    {resource_server_id, <<"rabbitmq">>},
    {key_config, [
      {default_key, <<"tests">>},
      {signing_keys, #{<<"tests">> => {map, #{
        <<"kty">> => <<"oct">>, <<"alg">> => <<"HS256">>, <<"k">> => <<"KEY">>}}}}
    ]}
  ]}
].
"""


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(seconds: float) -> str:
    header = {"alg": "HS256", "typ": "JWT", "kid": "tests"}
    claims = {
        "sub": "shop",
        "client_id": "shop",
        "aud": ["rabbitmq"],
        "exp": int(time.time() + seconds),
        "scope": [f"rabbitmq.{what}:*/*/*" for what in ("configure", "read", "write")],
    }
    text = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{encoded(hmac.new(KEY, text.encode(), hashlib.sha256).digest())}"


class OAuthBroker(PrivateBroker):
    """A broker that takes tokens signed with ``KEY``."""

    def _prepare(self, folder: Path) -> None:
        super()._prepare(folder)
        (folder / "plugins").write_text("[rabbitmq_auth_backend_oauth2].\n")
        (folder / "advanced.config").write_text(ADVANCED.replace("KEY", encoded(KEY)))


@pytest.fixture(scope="module")
def oauth_url() -> Iterator[str]:
    with OAuthBroker() as broker:
        broker.ctl("await_startup")
        yield without_user(broker.url)


def publish_for(seconds: float, publisher: Publisher) -> list[bool]:
    """Publish until then, to an exchange for which a permission is needed; return what was ok."""
    end, target = time.monotonic() + seconds, publisher.settings.exchange
    results = []
    while time.monotonic() < end:
        [event] = events_for(publisher, [target], unroutable="ignore")
        results.append(publisher.publish([event]).ok)
        time.sleep(0.1)
    return results


@pytest.mark.one_python
@pytest.mark.slow
def test_without_another_token_the_broker_refuses_events(oauth_url: str, name: str) -> None:
    expires = Credentials("", token(2), valid_for=1000)
    with Publisher(oauth_url, credentials=lambda: expires, exchange=name, timeout=1) as publisher:
        results = publish_for(3.2, publisher)
        publisher.close(0)
    assert results[0]
    assert not results[-1]


@pytest.mark.one_python
@pytest.mark.slow
def test_a_connection_outlives_its_token(oauth_url: str, name: str) -> None:
    asked: list[str] = []
    disconnected: list[object] = []

    def credentials() -> str:
        asked.append(threading.current_thread().name)
        return token(5)

    with Publisher(
        oauth_url, credentials=credentials, exchange=name, on_disconnected=disconnected.append
    ) as publisher:
        assert all(publish_for(6, publisher))
        assert not disconnected
    assert asked[0] == "outbox-publisher"
    assert len(asked) > 1
    assert set(asked[1:]) == {"outbox-credentials"}


@pytest.mark.one_python
def test_a_renewal_that_fails_is_tried_again(
    amqp_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "outbox.link")
    answers: list[Any] = [OSError("the issuer is away")]

    def credentials() -> Credentials:
        if threading.current_thread().name == "outbox-credentials" and answers:
            raise answers.pop()
        return Credentials("guest", "guest", valid_for=0.5)

    with Publisher(amqp_url, credentials=credentials, exchange=name) as publisher:
        publisher.make_ready()
        wait_until(lambda: "renewed the credentials" in caplog.text)
        assert publisher.connected
    assert "cannot renew the credentials for 127.0.0.1" in caplog.text
    assert "OSError: the issuer is away" in caplog.text


def test_a_connection_beside_an_open_one_is_logged_in_without_blocking_it(
    amqp_url: str, name: str
) -> None:
    go_on = threading.Event()
    asked: list[str] = []

    def credentials() -> tuple[str, str]:
        asked.append(threading.current_thread().name)
        assert len(asked) == 1 or go_on.wait(10)
        return "guest", "guest"

    opened: list[object] = []
    with Publisher(without_user(amqp_url), credentials=credentials, exchange=name) as publisher:
        publisher.make_ready()
        wait_until(lambda: publisher.connected)
        link: Any = publisher._own_transport()._link  # type: ignore[attr-defined]
        link.call(lambda: link.connect_apart(opened.append, lambda *_: None))
        wait_until(lambda: len(asked) == 2)
        answers = threading.Event()
        assert link.ping(answers.set)
        try:
            assert answers.wait(2)
            assert not opened
        finally:
            go_on.set()
        wait_until(lambda: opened)
    assert asked == ["outbox-publisher", "outbox-credentials"]


# ------------------------------------------------------------------------------------ settings


async def asynchronous() -> str:
    return ""


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("secret", "the setting 'credentials' is not callable, but a str$"),
        (asynchronous, "a coroutine function"),
        (lambda broker: "", "must take no arguments"),
    ],
)
def test_what_cannot_provide_credentials_is_refused(value: Any, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        Settings.load("memory://", {"credentials": value}, {})


@pytest.mark.parametrize(
    "given",
    [None, 17, ("a",), ("a", 1), ("a\0", "b"), Credentials("a", "b", valid_for=0), b"token"],
)
def test_what_are_no_credentials_is_refused_without_showing_them(given: Any) -> None:
    with pytest.raises(UsageError) as raised:
        credentials_of(lambda: given)
    assert "'b'" not in str(raised.value)


def test_no_password_is_shown() -> None:
    assert "secret" not in repr(Credentials("user", "secret"))
    provider = functools.partial(Credentials, "user", "secret")
    settings = Settings.load("memory://", {"credentials": provider}, {})
    assert "secret" not in repr(settings)
    assert settings.credentials is provider


def provided() -> tuple[str, str]:
    return "guest", "guest"


def test_the_environment_names_a_function() -> None:
    environ = {"OUTBOX_CREDENTIALS": f"{__name__}:provided"}
    assert Settings.load("memory://", {}, environ).credentials is provided
    for name, error in (
        ("provided", "is 'provided', not MODULE:FUNCTION"),
        (f"{__name__}:nothing", "which can't be imported"),
        ("no_such_module_here:x", "which can't be imported"),
        (f"{__name__}:KEY", "OUTBOX_CREDENTIALS is not callable"),
    ):
        with pytest.raises(UsageError, match=error):
            Settings.load("memory://", {}, {"OUTBOX_CREDENTIALS": name})


def test_an_external_login_excludes_them() -> None:
    url = "amqps://localhost/?auth=external&certfile=/nowhere"
    with pytest.raises(UsageError, match="excludes the setting 'credentials'"):
        Publisher(url, credentials=provided)
