"""Flask with Flask-SQLAlchemy: a view or command for each way in which work can end.

Each makes orders and enqueues an event of the same name for each: what is committed is delivered.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import click
from flask import (
    Flask,
    Response,
    abort,
    copy_current_request_context,
    current_app,
    stream_with_context,
)
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import auto_publishing, enqueue_event
from outbox.flask import Outbox


class Base(DeclarativeBase):
    """The tables of the application."""


db = SQLAlchemy(model_class=Base)
outbox = Outbox(db=db)


class Order(Base):
    """A row that is committed with its event."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Refused(Exception):
    """A failure that an error handler turns into a response."""


def order(name: str) -> None:
    """Add an order, and enqueue its event."""
    db.session.add(Order(name=name))
    enqueue_event(name, "order.placed")


def in_thread(function: Any) -> None:
    """Run ``function`` in a thread, and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def create_app() -> Flask:
    """Return an application for the database ``SHOP_DATABASE``."""
    app = Flask(__name__, instance_path=os.environ["SHOP_FOLDER"])
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SHOP_DATABASE"]
    app.config["SQLALCHEMY_BINDS"] = {"other": os.environ["SHOP_OTHER"]}
    db.init_app(app)
    outbox.init_app(app)
    _add_views(app)
    _add_handlers(app)
    _add_streams(app)
    _add_elsewhere(app)
    _add_without_transaction(app)
    _add_commands(app)
    return app


def _add_views(app: Flask) -> None:
    @app.get("/commit")
    def commit() -> str:
        order("commit")
        db.session.commit()
        return ""

    @app.get("/event-first")
    def event_first() -> str:
        enqueue_event("event-first", "order.placed")
        db.session.add(Order(name="event-first"))
        db.session.commit()
        return ""

    @app.get("/no-commit")
    def no_commit() -> str:
        order("no-commit")
        return ""

    @app.get("/never-touches-the-session")
    def never_touches_the_session() -> str:
        enqueue_event("never", "order.placed")
        return ""

    @app.get("/exception")
    def exception() -> str:
        order("exception")
        raise ValueError

    @app.get("/exception-after-commit")
    def exception_after_commit() -> str:
        order("exception-after-commit")
        db.session.commit()
        raise ValueError

    @app.get("/status-4xx-after-commit")
    def status_4xx_after_commit() -> tuple[str, int]:
        order("status-4xx-after-commit")
        db.session.commit()
        return "", 409

    @app.get("/abort")
    def abort_() -> str:
        order("abort")
        abort(404)

    @app.get("/rollback")
    def rollback() -> str:
        order("rollback")
        db.session.rollback()
        return ""

    @app.get("/flushed-rollback")
    def flushed_rollback() -> str:
        order("flushed")
        db.session.flush()
        db.session.rollback()
        return ""

    @app.get("/caught")
    def caught() -> str:
        try:
            order("caught")
            raise ValueError
        except ValueError:
            db.session.rollback()
            order("caught-then")
            db.session.commit()
        return ""

    @app.get("/savepoint")
    def savepoint() -> str:
        order("outer")
        try:
            with db.session.begin_nested():
                order("inner")
                raise ValueError
        except ValueError:
            pass
        db.session.commit()
        return ""

    @app.get("/no-transaction")
    def no_transaction() -> str:
        enqueue_event("no-transaction", "order.placed", session=None)
        return ""

    @app.get("/no-transaction-4xx")
    def no_transaction_4xx() -> tuple[str, int]:
        enqueue_event("no-transaction-4xx", "order.placed", session=None)
        return "", 409

    @app.get("/no-transaction-block-4xx")
    def no_transaction_block_4xx() -> tuple[str, int]:
        with auto_publishing(independent=True):
            enqueue_event("block", "order.placed", session=None)
        return "", 409


def _add_handlers(app: Flask) -> None:
    @app.get("/error-handler")
    def error_handler() -> str:
        order("error-handler")
        raise Refused("plain")

    @app.get("/error-handler-commits")
    def error_handler_commits() -> str:
        order("undone")
        raise Refused("commits")

    @app.errorhandler(Refused)
    def refused(error: Refused) -> tuple[str, int]:
        if str(error) == "commits":
            db.session.rollback()
            order("refusal")
            db.session.commit()
        return "", 402

    @app.get("/after-request-raises")
    def after_request_raises() -> str:
        order("after-request-raises")
        db.session.commit()
        return ""

    @app.get("/after-request-commits")
    def after_request_commits() -> str:
        order("after-request-commits")
        return ""

    @app.after_request
    def after(response: Response) -> Response:
        from flask import request

        if request.path.endswith("after-request-raises"):
            raise ValueError
        if request.path == "/after-request-commits":
            db.session.commit()
        return response


def _add_streams(app: Flask) -> None:
    @app.get("/stream")
    def stream() -> Response:
        def body() -> Iterator[str]:
            order("stream")
            yield "one"
            db.session.commit()
            yield "two"

        return Response(stream_with_context(body()))

    @app.get("/stream-fails")
    def stream_fails() -> Response:
        def body() -> Iterator[str]:
            order("stream-first")
            db.session.commit()
            yield "one"
            order("stream-second")
            raise ValueError

        return Response(stream_with_context(body()))

    @app.get("/stream-without-transaction")
    def stream_without_transaction() -> Response:
        def body() -> Iterator[str]:
            yield "one"
            enqueue_event("streamed", "order.placed", session=None)

        return Response(stream_with_context(body()))


def _add_elsewhere(app: Flask) -> None:
    @app.get("/nested-context")
    def nested_context() -> str:
        order("around")  # another session, which is not committed
        with app.app_context():
            order("nested")
            db.session.commit()
        return ""

    @app.get("/thread")
    def thread() -> tuple[str, int]:
        def work() -> None:
            with app.app_context():
                order("thread")
                db.session.commit()

        in_thread(work)
        return "", 409

    @app.get("/thread-without-transaction")
    def thread_without_transaction() -> tuple[str, int]:
        def work() -> None:
            with app.app_context():
                enqueue_event("thread-alone", "order.placed", session=None)

        in_thread(work)
        return "", 409

    @app.get("/request-context-in-thread")
    def request_context_in_thread() -> str:
        @copy_current_request_context
        def work() -> None:
            order("copied")
            db.session.commit()

        in_thread(work)
        return ""

    @app.get("/async-view")
    async def async_view() -> str:
        order("async")
        db.session.commit()
        return ""

    @app.get("/async-view-fails")
    async def async_view_fails() -> str:
        order("async-fails")
        raise ValueError

    @app.get("/two-databases")
    def two_databases() -> str:
        with db.engines["other"].begin() as other:  # another transaction, committed here
            other.exec_driver_sql("SELECT 1")
        order("two-databases")
        db.session.rollback()
        return ""


def _add_without_transaction(app: Flask) -> None:
    @app.get("/alone-caught")
    def alone_caught() -> str:
        try:
            enqueue_event("alone-caught", "order.placed", session=None)
            raise ValueError
        except ValueError:
            return ""

    @app.get("/alone-abort")
    def alone_abort() -> str:
        enqueue_event("alone-abort", "order.placed", session=None)
        abort(404)

    @app.get("/alone-error-handler")
    def alone_error_handler() -> str:
        enqueue_event("alone-error-handler", "order.placed", session=None)
        raise Refused("plain")

    @app.get("/alone-after-request-raises")
    def alone_after_request_raises() -> str:
        enqueue_event("alone-after-request-raises", "order.placed", session=None)
        return ""

    @app.get("/alone-stream-fails")
    def alone_stream_fails() -> Response:
        def body() -> Iterator[str]:
            enqueue_event("alone-stream-fails", "order.placed", session=None)
            yield "one"
            raise ValueError

        return Response(stream_with_context(body()))

    @app.get("/alone-nested-context")
    def alone_nested_context() -> str:
        with app.app_context():
            enqueue_event("alone-nested", "order.placed", session=None)
        return ""

    @app.get("/alone-request-context-in-thread")
    def alone_request_context_in_thread() -> tuple[str, int]:
        @copy_current_request_context
        def work() -> None:
            enqueue_event("alone-copied", "order.placed", session=None)

        in_thread(work)
        return "", 409

    @app.get("/alone-async-view")
    async def alone_async_view() -> str:
        enqueue_event("alone-async", "order.placed", session=None)
        return ""


def _add_commands(app: Flask) -> None:
    @app.cli.command("place")
    @click.argument("name")
    def place(name: str) -> None:
        order(name)
        db.session.commit()

    @app.cli.command("forget")
    def forget() -> None:
        order("forget")

    @app.cli.command("fail")
    def fail() -> None:
        order("fail")
        raise ValueError(current_app.name)

    @app.cli.command("announce")
    @click.option("--exit", "code", type=int)
    @click.option("--fail", is_flag=True)
    @click.pass_context
    def announce(context: click.Context, code: int | None, fail: bool) -> None:
        enqueue_event(f"announced {code} {fail}", "order.placed", session=None)
        if fail:
            raise ValueError
        if code is not None:
            context.exit(code)
