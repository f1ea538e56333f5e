"""``outbox-consume`` as its users run it, with a consumer that does what its messages say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outbox.messages.delivery import dead_letter_queue
from tests.places import Place, events_for
from tests.waiting import wait_until

__all__ = ["MODULE", "Command"]

MODULE = """
import os, time
from outbox.consumers import consumer

leaked = []


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


note("imported", "-", os.getpid())


@consumer("{name}")
def work(event):
    command, _, argument = str(event.payload["do"]).partition(" ")
    if command == "sleep":
        note("began", event.id, os.getpid())
        time.sleep(float(argument))
    elif command == "leak":
        leaked.append(b"x" * (int(argument) << 20))
    note("done", event.id, os.getpid())
"""


class Command:
    """One ``outbox-consume`` in a folder with a module ``work``."""

    def __init__(self, folder: Path, place: Place, name: str) -> None:
        self.place, self.folder, self.queue = place, folder, name
        self.process: subprocess.Popen[bytes]
        self._publisher = place.publisher(unroutable="fail")
        self._log = folder / "log"
        self.write(MODULE.format(name=name))
        place.will_clean_up(name)
        place.will_clean_up(dead_letter_queue(name))

    def write(self, module: str) -> None:
        (self.folder / "work.py").write_text(module)

    def start(self, *arguments: str, wrapped_in: Sequence[str] = ()) -> None:
        environment = {
            **os.environ,
            "OUTBOX_URL": self.place.url,
            "OUTBOX_EXCHANGE": self.place.exchange,
            "PYTHONDONTWRITEBYTECODE": "1",  # a module may change twice within its mtime's unit
        }
        command = ["outbox.consumers", "work", "--log-format", "json", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*wrapped_in, sys.executable, "-m", *command],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def publish(self, *commands: str) -> list[str]:
        """Publish ``commands`` to the consumer; return the ids of the messages."""
        events = events_for(self._publisher, [self.queue] * len(commands), exchange="")
        messages = [
            type(event)(
                id=event.id,
                target=event.target,
                exchange="",
                body=json.dumps({"do": do}).encode(),
                unroutable="fail",
            )
            for event, do in zip(events, commands, strict=True)
        ]
        # Until the queue exists nothing is published; after that, everything is.
        wait_until(lambda: self._publisher.publish(messages[:1], keep=False).ok, 20)
        if messages[1:]:
            self._publisher.publish(messages[1:]).raise_for_failure()
        return [event.id for event in messages]

    def did(self, word: str = "done") -> list[tuple[str, int]]:
        """Return the id of each message with this note, and the process that handled it."""
        path = self.folder / "done"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(row[1], int(row[2])) for row in rows if row[0] == word]

    def wait_done(self, count: int, word: str = "done") -> None:
        wait_until(lambda: len(self.did(word)) >= count, 20)

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def lines(self, logger: str = "outbox.consumer.processes") -> list[str]:
        records: list[dict[str, Any]] = []
        for line in self.text().splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return [record["message"] for record in records if record["logger"] == logger]

    def wait_for(self, pattern: str, count: int = 1, timeout: float = 20) -> list[Any]:
        """Wait until the log has ``count`` matches of ``pattern``; return all of them."""
        try:
            wait_until(lambda: len(re.findall(pattern, self.text())) >= count, timeout)
        except AssertionError:
            raise AssertionError(self.text()) from None
        return re.findall(pattern, self.text())

    def workers(self) -> list[int]:
        """Return the ids of all worker processes that have begun."""
        return [int(pid) for pid in re.findall(r"\(process (\d+)\) started", self.text())]

    def consuming(self, count: int) -> list[int]:
        """Wait until ``count`` workers in all have started to consume; return their ids."""
        self.wait_for('"consuming ', count)
        return self.workers()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def left(self) -> int:
        """Return the number of messages in the queue."""
        return self.place.count(self.queue)

    def close(self) -> None:
        self._publisher.close(0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its session: itself and its workers
        self.process.wait(10)
