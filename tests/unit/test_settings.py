"""URLs and settings: what is accepted, and how the rest is reported."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import traceback
from typing import Any, get_type_hints

import pytest

from outbox import (
    NotConfigured,
    Publisher,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.settings import SettingOverrides, Settings
from outbox.testing import recorded
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.url import BrokerURL


@pytest.mark.parametrize(
    ("url", "hosts", "user", "password", "vhost"),
    [
        ("amqp://h", (("h", 5672),), "guest", "guest", "/"),
        ("amqp://h/", (("h", 5672),), "guest", "guest", "/"),
        ("amqp://h/%2F", (("h", 5672),), "guest", "guest", "/"),
        ("amqps://h/v", (("h", 5671),), "guest", "guest", "v"),
        ("AMQP://u:p@h:1/v%2Fw", (("h", 1),), "u", "p", "v/w"),
        (
            "amqp://u%40x:p%2F%3A%40%25@a,b:2,[::1]:3/v",
            (("a", 5672), ("b", 2), ("::1", 3)),
            "u@x",
            "p/:@%",
            "v",
        ),
        ("amqp://u@h", (("h", 5672),), "u", "guest", "/"),
        ("amqp://u:p@x@h", (("h", 5672),), "u", "p@x", "/"),
        ("amqp://u:p@h//", (("h", 5672),), "u", "p", "/"),
        ("\t amqp://u:p@h:1/v\r\n", (("h", 1),), "u", "p", "v"),
        ("amqp://u:p@h/v%20\n", (("h", 5672),), "u", "p", "v "),
    ],
)
def test_amqp_urls_are_parsed(
    url: str, hosts: tuple[tuple[str, int], ...], user: str, password: str, vhost: str
) -> None:
    parsed = BrokerURL.parse(url)
    assert (parsed.hosts, parsed.user, parsed.password, parsed.vhost) == (
        hosts,
        user,
        password,
        vhost,
    )


@pytest.mark.hazard("A19")
@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:hunter2/secret@host/vhost",
        "amqp://user:hunter2#@host",
        "amqp://user:hunter2@host:port",
        "amqp://user:hunter2@host:99999",
        "amqp://user:hunter2@",
        "amqp://user:hunter2@h1,,h2",
        "amqp://user:hunter2:x@host",
        "amqp://user:hunter2@[::1",
        "amqp://user:hunter2?x@host",
        "amqp://user:1?hunter2=x@host",
        "amqp://user:x@y?hunter2=z@host",
        "amqp://user:hunter2%ff@host",
        "amqp://user:hunter2@host:" + "9" * 5_000,
        "amqp://user:hunter2@ho\nst",
        "amqp://user:hunter2\udcff@host",
        "amqp://user:hunter2@host/" + "v" * 256,
        "amqp://user:hunter2",
        "amqp://user:hunter2@host//vhost",
        "http://user:hunter2@host",
        "user:hunter2://host",
        "user:hunter2@host://",
        "hunter2",
        "",
    ],
)
def test_a_wrong_url_is_reported_without_any_part_of_the_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Publisher(url)
    assert "hunter2" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.hazard("A19")
def test_a_url_is_shown_without_its_password() -> None:
    parsed = BrokerURL.parse("amqp://user:hunter2@h:1,[::1]:2/a%2Fb")
    assert str(parsed) == "amqp://user:***@h:1,[::1]:2/a%2Fb"
    assert "hunter2" not in repr(parsed)
    assert "hunter2" not in repr(BrokerURL.parse("amqps://h/?password=hunter2"))
    assert "hunter2" not in repr(Publisher("amqp://user:hunter2@h"))


@pytest.mark.hazard("A19")
@pytest.mark.parametrize("url", ["amqps://user:hunter2@h/?cafile=hunter2", "hunter2", "\udcff"])
def test_the_settings_are_shown_without_the_password(url: str) -> None:
    settings = dataclasses.replace(Settings.load("memory://", {"max_kept": 7}, {}), url=url)
    for shown in (repr(settings), str(settings)):
        assert "hunter2" not in shown
        assert "max_kept=7" in shown
    assert settings.url == url
    assert settings == dataclasses.replace(settings)
    assert settings != dataclasses.replace(settings, url="memory://")


@pytest.mark.hazard("A19")
@pytest.mark.parametrize("wrong", ["a port", "an option", "a setting"])
def test_a_traceback_with_local_variables_shows_no_password_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    urls = {"a port": "amqp://user:hunter2@h:port", "an option": "amqps://user:hunter2@h/?x=1"}
    monkeypatch.setenv("OUTBOX_URL", urls.pop(wrong, "amqp://user:hunter2@h"))
    urls.clear()
    overrides: Any = {"timeot": 1} if wrong == "a setting" else {}
    with pytest.raises(UsageError) as caught:
        configure(**overrides)
    report = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(report.format())
    assert "in load" in shown or wrong == "an option"
    assert "hunter2" not in shown


@pytest.mark.hazard("A19")
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("pyamqp://h//", "'pyamqp', which outbox doesn't know; write amqp://"),
        ("amqp+ssl://h", "'amqp+ssl', which outbox doesn't know; write amqps://"),
        ("rediss://h", "'rediss', which outbox doesn't know; use amqp://user"),
        ("oracle://h/shop", "'oracle', which outbox doesn't know; it names a database"),
        ("mssql+pyodbc://h/shop", "it names a database"),
        ("sqlite+pysqlite:///x.db", "write sqlite://"),
        ("HTTP://h:15672", "the scheme 'http'"),
        ("'amqp://h'", "in quotes"),
        ("user@h://", "doesn't begin with a scheme"),
        ("localhost:5672", "has no scheme; use amqp://user"),
        (" ", "is empty"),
    ],
)
def test_a_wrong_scheme_is_named_with_the_right_one(url: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected.replace("+", r"\+")):
        BrokerURL.parse(url)


@pytest.mark.parametrize(
    ("url", "scheme", "shown"),
    [
        ("postgresql://h/shop", "postgresql", "postgresql://h:5432/shop"),
        ("postgres://u:hunter2@h/shop", "postgresql", "postgresql://u:***@h:5432/shop"),
        ("postgresql+asyncpg://u@h:1/a%2Fb", "postgresql", "postgresql://u@h:1/a%2Fb"),
        ("postgresql://h1,h2:2/shop", "postgresql", "postgresql://h1:5432,h2:2/shop"),
        ("postgresql:///shop?host=/run", "postgresql", "postgresql:///shop"),
        ("mysql+pymysql://u:hunter2@[::1]/shop", "mariadb", "mariadb://u:***@[::1]:3306/shop"),
    ],
)
def test_a_database_server_has_many_names(url: str, scheme: str, shown: str) -> None:
    parsed = BrokerURL.parse(url)
    assert (parsed.scheme, str(parsed)) == (scheme, shown)
    assert "hunter2" not in repr(parsed)


@pytest.mark.hazard("A19")
@pytest.mark.parametrize(
    "url", ["postgresql://u:a/hunter2@h/d", "mariadb://u:p@h:hunter2/d", "postgres://u:p#hunter2@h"]
)
def test_a_wrong_url_of_a_database_is_not_quoted(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        BrokerURL.parse(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.hazard("H2")
def test_certificates_and_host_names_are_verified() -> None:
    import ssl

    url = BrokerURL.parse("amqps://h/")
    [parameters] = connection_parameters(url, Settings(), "publisher")
    assert parameters.ssl_options is not None
    assert parameters.ssl_options.context.verify_mode is ssl.CERT_REQUIRED
    assert parameters.ssl_options.context.check_hostname
    assert parameters.ssl_options.server_hostname == "h"
    assert parameters.heartbeat == 20


@pytest.mark.hazard("H2")
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqps://h/?no_verify_ssl=1", "no_verify_ssl"),
        ("amqp://h/?cafile=x", "cafile"),
        ("amqps://h/?cafile=/nowhere", "TLS files"),
        ("amqps://h/?x", "name=value"),
    ],
)
def test_unknown_options_of_a_url_are_refused(url: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Publisher(url)


def test_configuring_without_a_url_names_the_possible_forms() -> None:
    with pytest.raises(NotConfigured, match="memory://"):
        configure()


def test_an_empty_url_counts_as_not_set() -> None:
    for empty in ("", " \n"):
        assert Settings.load(None, {}, {"OUTBOX_URL": empty}).url is None
    assert Settings.load(None, {}, {"OUTBOX_EXCHANGE": ""}).exchange == ""


def test_settings_are_taken_from_code_then_environment_then_default() -> None:
    environ = {"OUTBOX_TIMEOUT": "2.5", "OUTBOX_MAX_KEPT": "7", "OUTBOX_UNROUTABLE": "ignore"}
    settings = Settings.load("memory://", {"timeout": 1}, environ)
    assert (settings.timeout, settings.max_kept, settings.unroutable) == (1, 7, "ignore")
    assert (settings.url, settings.exchange) == ("memory://", "outbox")


def test_white_space_around_a_value_in_the_environment_is_ignored() -> None:
    values = {"URL": "memory://\n", "EXCHANGE": " shop\n", "DECLARE": "never\n"}
    settings = Settings.load(None, {}, {f"OUTBOX_{name}": text for name, text in values.items()})
    assert (settings.url, settings.exchange, settings.declare) == ("memory://", "shop", "never")


def test_a_program_without_a_url_but_white_space_can_still_be_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTBOX_URL", "\n")
    with recorded("a test") as collected_events:
        with auto_publishing():
            enqueue_event({}, "x")
        collected_events.assert_published("x")


def test_an_app_id_that_is_set_replaces_the_name_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sell"])
    assert Settings.load("memory://", {}, {}).app_id == "sell"
    assert Settings.load("memory://", {}, {"OUTBOX_APP_ID": "shop"}).app_id == "shop"
    for overrides, environ in (({"app_id": ""}, {}), ({}, {"OUTBOX_APP_ID": ""})):
        assert Settings.load("memory://", overrides, environ).app_id == ""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("url", "amqp://user:hunter2", "OUTBOX_URL is invalid: the port in the amqp URL"),
        ("url", "rediss://:hunter2@h/0", "OUTBOX_URL is invalid: .* 'rediss'"),
        ("timeout", "soon", "OUTBOX_TIMEOUT is 'soon', not a number"),
        ("max_kept", "1.5", "OUTBOX_MAX_KEPT is '1.5', not a number"),
        ("timeout", "-1", "OUTBOX_TIMEOUT is -1.0"),
        ("timeout", "nan", "OUTBOX_TIMEOUT"),
        ("timeout", "1e10", "not a number from 0 to 1000000000"),
        ("exchange", "\udcff", "OUTBOX_EXCHANGE is '\\\\udcff', not a string"),
        ("unroutable", "drop", "not one of park, fail, ignore"),
    ],
)
def test_a_wrong_environment_variable_is_named(name: str, value: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        Settings.load(None, {}, {f"OUTBOX_{name.upper()}": value})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("timeot", 1, "did you mean 'timeout'"),
        ("url", "x", "'url' is not a setting"),
        ("timeout", "5", "the setting 'timeout'"),
        ("max_kept", 1.5, "the setting 'max_kept'"),
        ("max_kept", True, "the setting 'max_kept'"),
        ("exchange", "e" * 256, "at most 255 bytes"),
        ("declare", "maybe", "not one of create, passive, never"),
        ("on_kept", 5, "not callable"),
        ("timeout", 1e10, "not a number from 0 to 1000000000"),
        ("heartbeat", 65_536, "not a number from 0 to 65535"),
        ("app_id", "\ud800", "not a string of at most 255 bytes"),
        ("serializer", "json", "no content_type"),
        ("headers", {"tenant": "acme"}, "not a function that returns headers"),
        ("headers", [dict, "tenant"], "nor a list of such"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Settings.load("memory://", {name: value}, {})


def test_every_setting_is_an_option_of_configure_and_is_documented() -> None:
    settings = set(get_type_hints(Settings)) - {"url"}
    assert set(get_type_hints(SettingOverrides)) == settings
    for name in settings:
        assert f"\n    {name}: " in inspect.cleandoc(Settings.__doc__ or ""), name


def test_the_name_of_a_file_must_be_text() -> None:
    for url in ("sqlite:///%ff.db", "sqlite:///a%00b.db"):
        with pytest.raises(UsageError, match="not UTF-8 text"):
            BrokerURL.parse(url)
