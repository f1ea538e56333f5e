"""Shows outbox at work: ``python -m examples.demo``, or ``scripts/demo`` which sets all up first.

Starts a private RabbitMQ, a web server and a worker as processes of their own, sends real HTTP
requests, kills the broker and starts it again. What it says of events it has seen on the broker,
with a plain AMQP connection. Exits with 0 only if every step was observed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pika
import pika.exceptions

from outbox.testing.broker import BrokerMissing, PrivateBroker

ROOT = Path(__file__).parents[1]
WITNESS = "demo.witness"


class Failed(Exception):
    """A step was not observed."""


def main() -> int:
    options = _parser().parse_args()
    try:
        with ExitStack() as stack:
            demo = Demo(stack, options.consumers)
            for number, name in enumerate(options.apps or ["flask", "fastapi"]):
                demo.show(name, outage=number == 0)
            demo.finish()
        say("All of it was observed.")
    except (Failed, BrokerMissing) as error:
        say(f"NOT OBSERVED: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--app",
        dest="apps",
        action="append",
        choices=("flask", "fastapi"),
        help="only the Flask application (under gunicorn), or the FastAPI one (under uvicorn)",
    )
    parser.add_argument(
        "--consumers",
        default="examples.shop.consumers",
        metavar="MODULE",
        help="the consumers that the worker runs (default: %(default)s)",
    )
    return parser


class Demo:
    """The processes, and one run of the story for each web application."""

    def __init__(self, stack: ExitStack, consumers: str) -> None:
        self._stack = stack
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
        stack.callback(shutil.rmtree, self._folder)
        step("a private RabbitMQ starts")
        self._broker = stack.enter_context(PrivateBroker())
        say(f"  it listens on {self._broker.url}")
        self._environment = {
            **os.environ,
            "OUTBOX_URL": self._broker.url,
            "SHOP_DATABASE": str(self._folder / "shop.db"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        step(f"a worker starts: outbox-consume {consumers}")
        self._worker = self._process("worker", "-m", "outbox.consumers.cli", consumers)
        self._witness = Witness(self._broker.url)
        stack.callback(self._witness.close)
        self._worker.until(
            lambda: (
                self._witness.consumers("shop.invoices") and self._witness.consumers("shop.ledger")
            ),
            "the worker consumes",
        )
        # A quorum queue that is younger than a moment may not survive the kill to come.
        self._queues_made_at = time.monotonic()

    def show(self, name: str, *, outage: bool) -> None:
        """Tell the story with one web application, with the broker's death or without."""
        port = free_port()
        with self._web_server(name, port) as server:
            orders = f"http://127.0.0.1:{port}/orders"

            step("an order is placed")
            status, answer, _ = post(orders, item="book", amount="12.50")
            expect(status == 201, f"the request answers 201, not {status}")
            order = answer["order_id"]
            placed = self._witness.next("order.placed")
            expect(placed["order_id"] == order, "the event is the order's")
            say(f"  HTTP 201; on the broker: order.placed {placed}")
            sent = self._witness.next("invoice.sent")
            expect(sent == {"order_id": order}, "the follow-on event is the order's")
            say(f"  consumed; the follow-on event: invoice.sent {sent}")
            self._worker.logs(f"order {order} is in the books")
            say("  and consumed in its turn")

            step("a payment is refused, and the order rolled back")
            status, answer, _ = post(orders, item="yacht", amount="1000000")
            expect(status == 402, f"the request answers 402, not {status}")
            expect(self._witness.is_quiet(1.0), "nothing was published")
            say(f"  HTTP 402, {answer['error']}; nothing was published")

            if outage:
                self._outage(orders)

            step("the web server is told to stop")
            code = server.stop()
            # uvicorn, having shut down in order, ends by the signal that it was sent.
            expect(
                code in (0, -signal.SIGTERM), f"the {name} server ends in order, not with {code}"
            )
            say("  it has ended in order")

    def _outage(self, orders: str) -> None:
        step("the broker is killed")
        time.sleep(max(0.0, self._queues_made_at + 3 - time.monotonic()))
        self._broker.kill()
        placed_meanwhile, times = [], []
        for number in range(5):
            status, answer, seconds = post(orders, item=f"lamp {number}", amount="30")
            expect(status == 201, f"a request without a broker answers 201, not {status}")
            placed_meanwhile.append(answer["order_id"])
            times.append(f"{seconds * 1000:.0f}")
            expect(seconds < 1, "it answers within a second")
        say(f"  five orders meanwhile: HTTP 201 after {', '.join(times)} ms")

        step("the broker comes back, and nobody sends a request")
        self._broker.start()
        arrived: set[int] = set()
        while len(arrived) < 5:
            arrived.add(self._witness.next("order.placed", 30)["order_id"])
        expect(arrived == set(placed_meanwhile), "these are the five orders")
        say(f"  all five arrived: orders {sorted(arrived)}")
        for order in placed_meanwhile:
            self._worker.logs(f"order {order} is in the books")
        say("  and were consumed")
        self._witness.forget()

    def finish(self) -> None:
        """Stop the worker."""
        step("the worker is told to stop")
        code = self._worker.stop()
        if code != 0:
            raise Failed(f"the worker exits with 0, not {code}\n{self._worker.tail()}")
        say("  it has exited with 0")

    @contextmanager
    def _web_server(self, name: str, port: int) -> Iterator[Process]:
        address = f"127.0.0.1:{port}"
        if name == "flask":
            command = [
                "gunicorn",
                "--threads",
                "4",
                "--bind",
                address,
                "examples.shop.flask_app:app",
            ]
        else:
            command = ["uvicorn", "--port", str(port), "examples.shop.fastapi_app:app"]
        step(f"a web server starts: {' '.join(command)}")
        server = self._process(name, "-m", *command)
        server.until(lambda: answers(port), "the web server listens")
        try:
            yield server
        except Failed as error:
            raise Failed(f"{error}\n{server.tail()}\n{self._worker.tail()}") from None
        finally:
            server.stop()

    def _process(self, name: str, *arguments: str) -> Process:
        process = Process(name, self._folder / f"{name}.log", self._environment, arguments)
        self._stack.callback(process.stop)
        return process


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
            )

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def until(self, condition: Callable[[], object], what: str, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running or time.monotonic() > deadline:
                raise Failed(f"{what}\n{self.tail()}")
            time.sleep(0.05)

    def logs(self, text: str, timeout: float = 20) -> None:
        self.until(
            lambda: text in self._log.read_text(), f"the {self._name} logs {text!r}", timeout
        )

    def tail(self) -> str:
        lines = self._log.read_text().splitlines()[-15:]
        return "\n".join([f"--- the end of the {self._name}'s log:", *lines])

    def stop(self) -> int:
        """Ask it to end, by its own id; return its exit code."""
        if self.running:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return self._child.wait(10)


class Witness:
    """Sees every event on the broker, over plain AMQP."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen: list[tuple[str, Any]] = []
        self._ids: set[str] = set()
        self._connect()
        self._channel.exchange_declare("outbox", "topic", durable=True)
        self._channel.queue_declare(WITNESS, durable=True)
        self._channel.queue_bind(WITNESS, "outbox", "#")

    def _connect(self) -> None:
        parameters = pika.URLParameters(self._url)
        parameters.heartbeat = 600
        self._connection = pika.BlockingConnection(parameters)
        self._channel = self._connection.channel()

    def consumers(self, queue: str) -> int:
        try:
            found = self._channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            self._channel = self._connection.channel()
            return 0
        return int(found.method.consumer_count)

    def next(self, target: str, timeout: float = 20) -> Any:
        """Return the payload of the next event to ``target``; a repeated id is passed over."""
        deadline = time.monotonic() + timeout
        while True:
            self._look()
            for index, (seen, payload) in enumerate(self._seen):
                if seen == target:
                    del self._seen[index]
                    return payload
            if time.monotonic() > deadline:
                raise Failed(f"{target} arrives on the broker")
            time.sleep(0.02)

    def is_quiet(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._look()
            time.sleep(0.05)
        return not self._seen

    def forget(self) -> None:
        """Let go of what has not been asked for."""
        self.is_quiet(0.5)
        self._seen.clear()

    def _look(self) -> None:
        while True:
            try:
                method, properties, body = self._channel.basic_get(WITNESS, auto_ack=True)
            except pika.exceptions.AMQPError:  # the broker was killed in between
                self._connect()
                continue
            if method is None:
                return
            if properties.message_id not in self._ids:
                self._ids.add(properties.message_id)
                self._seen.append((method.routing_key, json.loads(body)))

    def close(self) -> None:
        if self._connection.is_open:
            self._connection.close()


def post(url: str, **form: str) -> tuple[int, Any, float]:
    """Return status, decoded answer and seconds of a POST."""
    data = urllib.parse.urlencode(form).encode()
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(url, data, timeout=20) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
        error.close()
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


def expect(observed: bool, what: str) -> None:
    if not observed:
        raise Failed(what)


def step(text: str) -> None:
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    say(f"\033[1m{text}\033[0m" if bold else text)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
