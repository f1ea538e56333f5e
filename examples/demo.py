"""Demonstrates outbox: ``scripts/demo``, or ``python -m examples.demo`` if all is installed.

Starts a web server and a worker as separate processes that share an SQLite file, sends real HTTP
requests, kills the worker and starts another. With --rabbitmq or --postgresql they share a private
server instead, which is killed and restarted. A witness with its own queue sees every event. Exits
with 0 only if every step was observed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from outbox import Publisher
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.testing import BrokerMissing, PostgreSQLMissing, PrivateBroker, PrivatePostgreSQL

ROOT = Path(__file__).parents[1]
QUICK_MS = 100
QUICK_STORED_MS = 1000
interrupted = threading.Event()


class Failed(Exception):
    """A step was not observed."""


def main() -> int:
    options = _parser().parse_args()
    logging.disable()  # of the witness, which loses its connection with the broker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with ExitStack() as stack:
            demo = options.kind(stack, options.consumers)
            for number, name in enumerate(options.apps or ["flask", "fastapi", "django"]):
                demo.show(name, trouble=number == 0)
            demo.finish()
        say("Every step was observed.")
    except (Failed, BrokerMissing, PostgreSQLMissing, TimeoutError) as error:
        say(f"NOT OBSERVED: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted; everything has been stopped.")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--rabbitmq",
        dest="kind",
        action="store_const",
        const=DemoOnRabbitMQ,
        default=DemoOnSQLite,
        help="use a private RabbitMQ, which must be installed, instead of an SQLite file",
    )
    parser.add_argument(
        "--postgresql",
        dest="kind",
        action="store_const",
        const=DemoOnPostgreSQL,
        help="use a private PostgreSQL, which must be installed",
    )
    parser.add_argument(
        "--app",
        dest="apps",
        action="append",
        choices=("flask", "fastapi", "django"),
        help="run only this application: the Flask or the Django one (under gunicorn), or the "
        "FastAPI one (under uvicorn)",
    )
    parser.add_argument(
        "--django",
        dest="apps",
        action="append_const",
        const="django",
        help="the same as --app django",
    )
    parser.add_argument(
        "--consumers",
        default="examples.shop.consumers",
        metavar="MODULE",
        help="the consumers that the worker runs (default: %(default)s)",
    )
    return parser


class Demo:
    """The processes, and the story, which runs once for each web application."""

    def __init__(self, stack: ExitStack, consumers: str) -> None:
        self._stack = stack
        self._consumers = consumers
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
        stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._processes: list[Process] = []
        stack.push(self._show_logs)
        self._url = self._prepare()
        self._witness = Witness()
        self._stack.enter_context(self._witness.watching(self._url))
        self._environment = {
            **{name: os.environ[name] for name in os.environ if not name.startswith("OUTBOX_")},
            "OUTBOX_URL": self._url,
            "SHOP_DATABASE": str(self._folder / "shop.db"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "XDG_RUNTIME_DIR": str(self._folder),  # where gunicorn puts its control socket
        }
        self._worker = self._start_worker("worker")
        # A quorum queue may not survive if the broker is killed right after creating it.
        self._queues_made_at = time.monotonic()

    def _prepare(self) -> str:
        """Set up what the processes share; return its URL."""
        raise NotImplementedError

    def _trouble(self, name: str, orders: str) -> None:
        raise NotImplementedError

    def _start_worker(self, name: str) -> Process:
        step(f"a worker starts: outbox-consume {self._consumers}")
        worker = self._process(name, "-m", "outbox.consumers", self._consumers)
        worker.until(lambda: "consuming 'shop" in worker.log, "the worker consumes")
        return worker

    def show(self, name: str, *, trouble: bool) -> None:
        """Run the story with one web application; with ``trouble``, a process is killed."""
        port = free_port()
        with self._web_server(name, port) as server:
            orders = f"http://127.0.0.1:{port}/orders"

            step("an order is placed")
            status, answer, _ = post(orders, item="book", amount="12.50")
            expect(status == 201, f"the request is answered with 201, not {status}")
            order = answer["order_id"]
            placed = self._witness.next("order.placed")
            expect(placed["order_id"] == order, "the event belongs to the order")
            say(f"  HTTP 201; published: order.placed {placed}")
            sent = self._witness.next("invoice.sent")
            expect(sent == {"order_id": order}, "the follow-on event belongs to the order")
            say(f"  consumed; the follow-on event: invoice.sent {sent}")
            self._worker.logs(f"order {order} is in the books")
            say("  and consumed as well")

            step("a payment is refused, and the order is rolled back")
            status, answer, _ = post(orders, item="yacht", amount="1000000")
            expect(status == 402, f"the request is answered with 402, not {status}")
            expect(self._witness.is_quiet(1.0), "nothing was published")
            say(f"  HTTP 402, {answer['error']}; nothing was published")

            if trouble:
                self._trouble(name, orders)

            step("the web server gets SIGTERM")
            code = server.stop()
            # uvicorn, after a graceful shutdown, kills itself with the signal that it received.
            graceful = -signal.SIGTERM if name == "fastapi" else 0
            expect(code in (0, graceful), f"the {name} server stops gracefully, not with {code}")
            server.logs("Finished server process" if name == "fastapi" else "Shutting down")
            say("  it stopped gracefully")

    def _place_five(self, orders: str) -> tuple[list[int], list[float]]:
        """Place five orders; return their ids, and the milliseconds that each took."""
        placed, times = [], []
        for number in range(5):
            status, answer, seconds = post(orders, item=f"lamp {number}", amount="30")
            expect(status == 201, f"a request meanwhile is answered with 201, not {status}")
            placed.append(answer["order_id"])
            times.append(seconds * 1000)
        say(f"  five orders meanwhile: HTTP 201 after {', '.join(f'{ms:.0f}' for ms in times)} ms")
        return placed, times

    def _see_arrive(self, placed: list[int]) -> None:
        arrived = {self._witness.next("order.placed", 30)["order_id"] for _ in placed}
        expect(arrived == set(placed), "the events belong to the five orders")
        say(f"  all five arrived: orders {sorted(arrived)}")

    def _see_consumed(self, placed: list[int]) -> None:
        invoiced = {self._witness.next("invoice.sent", 30)["order_id"] for _ in placed}
        expect(invoiced == set(placed), "each led to an invoice")
        for order in placed:
            self._worker.logs(f"order {order} is in the books")
        say("  and were consumed, each with a follow-on event")

    def finish(self) -> None:
        """Stop the worker."""
        step("the worker gets SIGTERM")
        code = self._worker.stop()
        expect(code == 0, f"the worker exits with 0, not {code}")
        say("  it exited with 0")

    @contextmanager
    def _web_server(self, name: str, port: int) -> Iterator[Process]:
        address = f"127.0.0.1:{port}"
        gunicorn = ["gunicorn", "--threads", "4", "--bind", address]
        if name == "flask":
            command = [*gunicorn, "examples.shop.flask_app:app"]
        elif name == "django":
            self._migrate()
            command = [*gunicorn, "examples.shop.django_shop.wsgi"]
        else:
            command = ["uvicorn", "--port", str(port), "examples.shop.fastapi_app:app"]
        step(f"a web server starts: {' '.join(command)}")
        server = self._process(name, "-m", *command)
        server.until(lambda: answers(port), "the web server listens")
        try:
            yield server
        finally:
            server.stop()

    def _migrate(self) -> None:
        command = ["examples.shop.django_shop.manage", "migrate"]
        step(f"Django makes its tables, and outbox's: python -m {' '.join(command)}")
        migration = self._process("migration", "-m", *command)
        migration.until(lambda: not migration.running, "the migrations end", ends=True)
        expect(migration.stop() == 0, "the migrations succeed")

    def _process(self, name: str, *arguments: str) -> Process:
        process = Process(name, self._folder / f"{name}.log", self._environment, arguments)
        self._processes.append(process)
        self._stack.callback(process.stop)
        return process

    def _show_logs(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Failed | TimeoutError):
            for process in self._processes:
                say(process.tail())


class DemoOnSQLite(Demo):
    """The demo on an SQLite file; the worker is killed."""

    def _prepare(self) -> str:
        url = f"sqlite:///{self._folder / 'outbox.db'}"
        step(f"no broker is needed: events are in {url}")
        return url

    def _trouble(self, name: str, orders: str) -> None:
        step("the worker is killed")
        self._worker.kill()
        placed, _ = self._place_five(orders)
        self._see_arrive(placed)
        self._worker = self._start_worker("second worker")
        self._see_consumed(placed)


class DemoOnServer(Demo):
    """The demo on a private server as the broker, which is killed."""

    _broker: PrivateBroker | PrivatePostgreSQL

    def _trouble(self, name: str, orders: str) -> None:
        step("the broker is killed")
        time.sleep(max(0.0, self._queues_made_at + 3 - time.monotonic()))
        self._broker.kill()
        placed, times = self._place_five(orders)
        expect(times[0] < 1000, "the first of them is answered within a second")
        # The first may notice the lost connection and wait; later ones must not wait at all.
        # Django commits the events to a file, too.
        quick = QUICK_STORED_MS if name == "django" else QUICK_MS
        expect(sum(times[1:]) < quick, f"the others are answered within {quick} ms in all")

        step("the broker is restarted, and no further request is sent")
        self._broker.start()
        self._see_arrive(placed)
        self._see_consumed(placed)


class DemoOnRabbitMQ(DemoOnServer):
    """The demo on RabbitMQ."""

    def _prepare(self) -> str:
        step("a private RabbitMQ starts")
        self._broker = self._stack.enter_context(PrivateBroker())
        say(f"  it listens on {self._broker.url}")
        return self._broker.url


class DemoOnPostgreSQL(DemoOnServer):
    """The demo on PostgreSQL."""

    def _prepare(self) -> str:
        step("a private PostgreSQL starts")
        self._broker = self._stack.enter_context(PrivatePostgreSQL())
        url = self._broker.url
        say(f"  it listens on {url}")
        step("the tables are created: outbox sql create")
        command = [sys.executable, "-m", "outbox", "sql", "create", "--database", url]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return url


class Process:
    """A child process with its log."""

    def __init__(
        self, name: str, log: Path, environment: dict[str, str], arguments: tuple[str, ...]
    ) -> None:
        self._name = name
        self._log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=log.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # only the demo gets Ctrl-C, and stops the others
            )

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def until(
        self, condition: Callable[[], object], what: str, timeout: float = 20, *, ends: bool = False
    ) -> None:
        """Wait until ``condition()``; fail if the process ends before, unless it ``ends``."""
        deadline = time.monotonic() + timeout
        while not condition():
            go_on()
            if not (self.running or ends) or time.monotonic() > deadline:
                raise Failed(what)
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def logs(self, text: str) -> None:
        self.until(lambda: text in self.log, f"the {self._name} logs {text!r}")

    def tail(self) -> str:
        lines = self.log.splitlines()[-15:]
        return "\n".join([f"--- the end of the log of the {self._name}:", *lines])

    def kill(self) -> None:
        """Kill it, like a crash."""
        self._child.kill()
        self._child.wait(10)

    def stop(self) -> int:
        """Send it SIGTERM, wait, and return its exit code."""
        if self.running:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:  # the exit code is then -9: a failure
                self._child.kill()
        return self._child.wait(10)


class Witness(Consumer):
    """The consumer that sees every published event."""

    queue = "demo.witness"
    topics = ("#",)

    def __init__(self) -> None:
        self._seen: list[tuple[str, Any]] = []
        self._ids: set[str] = set()

    @contextmanager
    def watching(self, url: str) -> Iterator[None]:
        """Consume from ``url`` in a ``with`` block."""
        with Publisher(url) as publisher:
            worker = Worker([self], publisher=publisher, threads=1)  # one needs no lock
            worker.start()
            try:
                deadline = time.monotonic() + 20
                while not worker.is_consuming:
                    expect(time.monotonic() < deadline, "the witness consumes")
                    time.sleep(0.02)
                yield
            finally:
                worker.stop(5)

    def process(self, event: ReceivedEvent) -> None:
        if event.id not in self._ids:  # an event may be delivered twice
            self._ids.add(event.id)
            self._seen.append((event.target, event.payload))

    def next(self, target: str, timeout: float = 20) -> Any:
        """Wait for the next event to ``target``; return its payload."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            go_on()
            for index, (seen, payload) in enumerate(self._seen):
                if seen == target:
                    del self._seen[index]
                    return payload
            time.sleep(0.02)
        raise Failed(f"{target} arrives")

    def is_quiet(self, seconds: float) -> bool:
        time.sleep(seconds)
        return not self._seen


def post(url: str, **form: str) -> tuple[int, Any, float]:
    """Send a POST; return the status, the decoded answer and the seconds that it took."""
    data = urllib.parse.urlencode(form).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    begin = time.perf_counter()
    try:
        with direct.open(url, data, timeout=20) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
        error.close()
    except OSError as error:
        raise Failed(f"the web server answers, instead of {error!r}") from error
    return status, json.loads(body), time.perf_counter() - begin


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End the demo; ignore further signals, so that they don't disturb the clean-up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    interrupted.set()
    raise KeyboardInterrupt


def go_on() -> None:
    """Raise the interrupt again if Python discarded it, as it does in a destructor."""
    if interrupted.is_set():
        raise KeyboardInterrupt


def expect(observed: bool, what: str) -> None:
    if not observed:
        raise Failed(what)


def step(text: str) -> None:
    go_on()
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    say(f"\033[1m{text}\033[0m" if bold else text)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
