"""The Flask extension: publishers, configuration, contexts, sessions."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy

from outbox import (
    NotConfigured,
    Publisher,
    UsageError,
    auto_publishing,
    configuration,
    configure,
    enqueue_event,
    publish,
    sinks,
)
from outbox.configuration import override_url
from outbox.consumers import Consumer
from outbox.flask import Outbox
from outbox.middleware.wsgi import OutboxMiddleware
from outbox.testing import CollectedEvents, recorded


@pytest.fixture(autouse=True)
def unbound() -> Iterator[None]:
    """Nothing of the applications remains in the process."""
    yield
    sinks.bind(None)
    override_url(None)


outbox = Outbox()


def make_app(name: str = "shop", **config: Any) -> Flask:
    app = Flask(name)
    app.config.update({"OUTBOX_URL": "memory://", **config})
    outbox.init_app(app)

    @app.get("/order")
    def order() -> str:
        enqueue_event(name, "order.placed")
        return ""

    @app.get("/refused")
    def refused() -> tuple[str, int]:
        enqueue_event(name, "order.placed")
        return "", 409

    return app


def publisher_of(app: Flask) -> Publisher:
    with app.app_context():
        return outbox.publisher


def test_each_application_has_its_own_publisher() -> None:
    one, two = make_app("one", OUTBOX_EXCHANGE="one"), make_app("two", OUTBOX_EXCHANGE="two")
    assert publisher_of(one).settings.exchange == "one"
    assert publisher_of(two).settings.exchange == "two"
    assert publisher_of(one) is publisher_of(one)
    process = configure("memory://")
    for app, count in ((one, 1), (two, 2)):
        for _ in range(count):
            app.test_client().get("/order")
    with auto_publishing():
        enqueue_event({}, "of.the.process")
    counts = [each.stats().published for each in (publisher_of(one), publisher_of(two), process)]
    assert counts == [1, 2, 1]


def test_each_application_adds_its_own_headers() -> None:
    one = make_app("one", OUTBOX_HEADERS=lambda: {"app": "one"})
    two = make_app("two", OUTBOX_HEADERS=[lambda: {"app": "two"}])
    with recorded("here") as events:
        for app in (one, two, one):
            app.test_client().get("/order")
    assert [event.headers["app"] for event in events.published] == ["one", "two", "one"]


def test_a_hundred_applications_open_nothing() -> None:
    threads, before = threading.active_count(), set(_publishers())
    apps = [make_app(OUTBOX_URL="amqp://127.0.0.1:9") for _ in range(100)]
    for app in apps:
        assert app.test_client().get("/nowhere").status_code == 404
    assert threading.active_count() <= threads
    assert not set(_publishers()) - before


def _publishers() -> Any:
    from outbox import publisher

    return publisher._open_publishers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"OUTBOX_EXCHANG": "shop"}, "'OUTBOX_EXCHANG'; did you mean 'OUTBOX_EXCHANGE'"),
        ({"OUTBOX_WHATEVER_ELSE": 1}, "'OUTBOX_WHATEVER_ELSE'; known: OUTBOX_EXCHANGE,"),
        ({"OUTBOX_TIMEOUT": "soon"}, r"app.config\['OUTBOX_TIMEOUT'\].*not a number"),
        ({"OUTBOX_URL": "http://host"}, r"app.config\['OUTBOX_URL'\]"),
        ({"OUTBOX_HEADERS": "x"}, r"app.config\['OUTBOX_HEADERS'\].*not a function"),
        ({"OUTBOX_URL": 5}, r"app.config\['OUTBOX_URL'\].*not int"),
    ],
)
def test_a_wrong_key_or_value_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_app(**config)


def test_a_password_is_not_shown() -> None:
    app = make_app(OUTBOX_URL="amqp://user:secret@host/")
    assert "secret" not in repr(app.extensions["outbox"].config())


def test_the_environment_gives_what_the_configuration_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_URL", "sqlite:///environment.db")
    monkeypatch.setenv("OUTBOX_EXCHANGE", "environment")
    monkeypatch.setenv("OUTBOX_TIMEOUT", "3")
    settings = publisher_of(make_app(OUTBOX_EXCHANGE="config")).settings
    assert (settings.url, settings.exchange, settings.timeout) == ("memory://", "config", 3)
    for unset in (None, ""):
        app = make_app(OUTBOX_URL=unset, OUTBOX_EXCHANGE=None)
        settings = publisher_of(app).settings
        assert (settings.url, settings.exchange) == ("sqlite:///environment.db", "environment")


def test_the_configuration_is_read_at_the_first_event() -> None:
    app = make_app()
    app.config["OUTBOX_EXCHANGE"] = "later"
    assert publisher_of(app).settings.exchange == "later"
    app = make_app()
    app.config["OUTBOX_EXCHANG"] = "later"
    with pytest.raises(UsageError, match="did you mean"):
        publisher_of(app)


def test_without_a_url_the_publisher_of_the_process_is_used() -> None:
    app = make_app(OUTBOX_URL=None)
    with pytest.raises(NotConfigured, match="OUTBOX_URL"):
        publisher_of(app)
    process = configure("memory://")
    assert publisher_of(app) is process


def test_the_url_of_a_command_has_precedence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    override_url("sqlite:///command.db")
    assert publisher_of(make_app()).settings.url == "sqlite:///command.db"


def test_an_application_has_one_outbox() -> None:
    app = make_app()
    with pytest.raises(UsageError, match="'shop' has an Outbox already"):
        outbox.init_app(app)
    assert Outbox(Flask("direct")) is not None


def test_without_a_context_there_is_no_publisher() -> None:
    app = make_app()
    with pytest.raises(UsageError, match=r"with app\.app_context"):
        _ = outbox.publisher
    assert app.extensions["outbox"].publisher_if_any() is publisher_of(app)
    with Flask("other").app_context(), pytest.raises(UsageError, match=r"after init_app.*'other'"):
        _ = outbox.publisher


def test_a_test_needs_no_url(collected_events: CollectedEvents) -> None:
    app = make_app(OUTBOX_URL=None, OUTBOX_EXCHANGE="shop")
    client = app.test_client()
    assert client.get("/order").status_code == 200
    collected_events.assert_published("order.placed", "shop")
    assert collected_events.published[0].exchange == "shop"
    client.get("/refused")
    assert len(collected_events.published) == 1
    collected_events.assert_cleared("order.placed")


def test_an_application_serves_several_tests() -> None:
    app = make_app(OUTBOX_URL=None)
    for name in ("first", "second"):
        with recorded(name) as collected:
            app.test_client().get("/order")
            assert len(collected.published) == 1


def test_an_application_that_is_wrapped_once_more_keeps_its_publisher() -> None:
    app = make_app()
    app.wsgi_app = OutboxMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    app.test_client().get("/order")
    assert publisher_of(app).stats().published == 1


def test_a_context_is_a_unit_of_work(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    publisher = publisher_of(app)
    with app.app_context():
        enqueue_event(1, "a")
        with app.app_context():
            enqueue_event(2, "a")
        assert publisher.stats().published == 0
    assert publisher.stats().published == 2
    with pytest.raises(ValueError), app.app_context():
        enqueue_event(3, "a")
        raise ValueError
    assert publisher.stats().published == 2
    assert "1 event(s) dropped because their app context ended with ValueError" in caplog.text
    try:
        raise KeyError
    except KeyError:
        with app.app_context():
            enqueue_event(4, "a")
    assert publisher.stats().published == 3


def test_a_context_inside_a_block_belongs_to_it() -> None:
    app = make_app()
    publisher = publisher_of(app)
    with auto_publishing():
        with app.app_context():
            enqueue_event(1, "a")
        assert publisher.stats().published == 0
    assert publisher.stats().published == 1
    with app.app_context(), auto_publishing():
        enqueue_event(2, "a")
    assert publisher.stats().published == 2
    with app.app_context():
        enqueue_event(3, "a")
        publish()
        assert publisher.stats().published == 3


def test_a_block_has_the_events_of_one_application() -> None:
    one, two = make_app("one"), make_app("two")
    with auto_publishing():
        with one.app_context():
            enqueue_event(1, "a")
        with two.app_context():
            with pytest.raises(UsageError, match=r"two applications.*independent=True"):
                enqueue_event(2, "a")
            with auto_publishing(independent=True):
                enqueue_event(3, "a")
    assert [publisher_of(app).stats().published for app in (one, two)] == [1, 1]


PUSHED = """
import logging; logging.basicConfig()
from flask import Flask
from outbox import enqueue_event
from outbox.flask import Outbox

app = Flask("shop")
app.config["OUTBOX_URL"] = "memory://"
Outbox(app)
app.app_context().push()
enqueue_event(1, "a", id="lost-one")
"""


def test_events_of_a_context_that_is_never_popped_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PUSHED],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "1 event(s) lost: their app context was pushed and never popped" in done.stderr
    assert "lost-one" in done.stderr


def test_the_shell_publishes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import code

    app = make_app()
    published = []

    def interact(*_: Any, **__: Any) -> None:
        enqueue_event(1, "a")
        published.append(outbox.publisher.stats().published)
        raise SystemExit

    monkeypatch.setattr(code, "interact", interact)
    from flask.cli import shell_command

    app.test_cli_runner().invoke(shell_command)
    assert published == [1]


def test_a_handler_that_a_test_calls_has_a_context(collected_events: CollectedEvents) -> None:
    class Work(Consumer):
        queue = "work"
        auto_publish = True

        def process(self, event: Any) -> None:
            seen.append((current_app.name, current_app.app_context))
            enqueue_event({}, "work.done")

    seen: list[Any] = []
    with make_app(OUTBOX_URL=None).app_context():
        collected_events.perform(Work, {})
    assert [name for name, _ in seen] == ["shop"]
    collected_events.assert_published("work.done")


def stored(path: Path, *names: str) -> list[Flask]:
    """Return applications with one SQLAlchemy, each with a database of its name."""
    db = SQLAlchemy()
    extension = Outbox(db=db)
    apps = []
    for name in names:
        app = Flask(name, instance_path=str(path))
        app.config["OUTBOX_URL"] = "memory://"
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{name}.db"
        extension.init_app(app)
        db.init_app(app)  # in any order
        with app.app_context():
            db.create_all()
        apps.append(app)
    return apps


def rows(app: Flask) -> int:
    from outbox.sql import events

    with app.app_context():
        count: int = app.extensions["sqlalchemy"].session.query(events).count()
        return count


def test_events_are_stored_in_the_session_of_the_current_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_AFTER_COMMIT", "nothing")
    one, two = stored(tmp_path, "one", "two")
    plain = make_app("plain")
    for app, count in ((one, 1), (two, 2)):
        with app.app_context():
            for _ in range(count):
                enqueue_event({}, "a")
            app.extensions["sqlalchemy"].session.commit()
    with plain.app_context():
        enqueue_event({}, "a")
    configure("memory://")
    with auto_publishing():
        enqueue_event({}, "a")
    assert [rows(one), rows(two)] == [1, 2]
    assert publisher_of(plain).stats().published == 1
    process = configuration.configured_publisher()
    assert process is not None
    assert process.stats().published == 1
    _dispose(one, two)


def test_an_event_that_a_relay_will_publish_has_the_exchange_of_its_application(
    tmp_path: Path,
) -> None:
    from sqlalchemy import text

    [app] = stored(tmp_path, "shop")
    app.config.update(OUTBOX_URL=None, OUTBOX_EXCHANGE="of-the-shop")  # no publisher here
    with app.app_context():
        session = app.extensions["sqlalchemy"].session
        enqueue_event({}, "a")
        session.commit()
        [exchange] = session.execute(text("SELECT exchange FROM outbox_events")).scalars()
    assert exchange == "of-the-shop"
    _dispose(app)


def test_a_session_without_a_commit_takes_its_events_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, collected_events: CollectedEvents
) -> None:
    [app] = stored(tmp_path, "shop")
    with app.app_context():
        enqueue_event({}, "a")
        enqueue_event({}, "b", session=None)
    collected_events.assert_published("b")
    collected_events.assert_cleared("a")
    assert len(collected_events.published) == 1
    [record] = [one for one in caplog.records if one.name == "outbox.sql"]
    assert (record.levelno, record.getMessage().count("db.session.commit()")) == (
        logging.WARNING,
        1,
    )
    _dispose(app)


def test_events_after_a_failed_flush_are_collected(
    tmp_path: Path, collected_events: CollectedEvents
) -> None:
    from sqlalchemy import text

    [app] = stored(tmp_path, "shop")
    with app.app_context():
        session = app.extensions["sqlalchemy"].session
        enqueue_event({}, "a", id="same")
        session.flush()
        with pytest.raises(Exception, match="no such table"):
            session.execute(text("INSERT INTO nowhere VALUES (1)"))
        session.rollback()
        enqueue_event({}, "b")
        session.commit()
    collected_events.assert_stored("b")
    collected_events.assert_cleared("a")
    _dispose(app)


def test_the_tables_become_part_of_the_metadata_once(tmp_path: Path) -> None:
    apps = stored(tmp_path, "one", "two")
    names = set(apps[0].extensions["sqlalchemy"].metadata.tables)
    assert {"outbox_events", "outbox_inbox"} <= names
    _dispose(*apps)


def test_only_flask_sqlalchemy_stores_events() -> None:
    with pytest.raises(UsageError, match="not the SQLAlchemy"):
        Outbox(Flask("shop"), db=object())
    app = Flask("shop")
    app.config["OUTBOX_URL"] = "memory://"
    Outbox(app, db=SQLAlchemy())
    with app.app_context(), pytest.raises(UsageError, match=r"db\.init_app\(app\)"):
        enqueue_event({}, "a")


def test_without_flask_the_extra_is_named() -> None:
    program = "import sys; sys.modules['flask'] = None\nimport outbox.flask"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "MissingExtra: outbox.flask needs Flask" in done.stderr
    assert "outbox-events[flask]" in done.stderr


def _dispose(*apps: Flask) -> None:
    for app in apps:
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()


def test_the_context_globals_belong_to_the_application() -> None:
    class Globals:
        """A class without members, as `app_ctx_globals_class` allows."""

    app = make_app()
    with app.app_context():
        enqueue_event(1, "order.placed")
        assert list(g) == []
    app.app_ctx_globals_class = Globals  # type: ignore[assignment]
    with app.app_context():
        enqueue_event(2, "order.placed")
    assert publisher_of(app).stats().published == 2
