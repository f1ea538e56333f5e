"""The files that ``outbox init`` writes: a consumer, its test, and a unit of systemd."""

from __future__ import annotations

import keyword
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from outbox.errors import UsageError

__all__ = ["Generated"]

_CONSUMER = '''\
"""The consumer of the queue {queue}."""

import logging

from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy

logger = logging.getLogger(__name__)


class {kind}(Consumer):
    """Process the messages of the queue {queue}.

    A message may be delivered more than once: what process() does must be safe to repeat.
    """

    queue = "{queue}"
    topics = {topics}
    retry = RetryPolicy(max_attempts=5)
    timeout = 60

    def process(self, event: ReceivedEvent) -> None:
        """Process one message; if this raises an exception, it is tried again later."""
        logger.info("%s: %r", event.target, event.payload)
'''

_TEST = '''\
"""Tests of the consumer of the queue {queue}."""

from outbox import auto_publishing, enqueue_event
from outbox.testing import CollectedEvents

from {module} import {kind}


def test_an_event_reaches_the_consumer(collected_events: CollectedEvents) -> None:
    """An event is published, delivered and processed."""
    with auto_publishing():
        enqueue_event({{"id": 17}}, "{target}")
    [done] = collected_events.deliver({kind})
    assert done.acked


def test_a_message_is_processed(collected_events: CollectedEvents) -> None:
    """A message without a broker or an event."""
    done = collected_events.perform({kind}, {{"id": 17}})
    assert done.acked
    assert not done.follow_ons
'''

_DJANGO_TEST = '''\
"""Tests of the consumer of the queue {queue}."""

from django.test import TestCase
from outbox import enqueue_event
from outbox.testing import CollectedEventsMixin

from {module} import {kind}


class {kind}Test(CollectedEventsMixin, TestCase):
    """What the consumer does with its messages."""

    def test_an_event_reaches_the_consumer(self) -> None:
        """An event is published at the commit, delivered and processed."""
        with self.captureOnCommitCallbacks(execute=True):
            enqueue_event({{"id": 17}}, "{target}")
        [done] = self.collected_events.deliver({kind})
        self.assertTrue(done.acked)

    def test_a_message_is_processed(self) -> None:
        """A message without an event."""
        done = self.collected_events.perform({kind}, {{"id": 17}})
        self.assertTrue(done.acked)
'''

_UNIT = """\
# Copy it to /etc/systemd/system, and write OUTBOX_URL=amqp://... to /etc/outbox/{name}.env, with
# mode 600. Then: systemctl daemon-reload, systemctl enable --now {unit}
[Unit]
Description=Consumer of the queue {queue}
Wants=network-online.target
After=network-online.target

[Service]
# It says when its workers consume, when it reloads and stops, and that it is alive.
Type=notify
NotifyAccess=main
WatchdogSec=30
TimeoutStartSec=120
WorkingDirectory={folder}
# If that is a link to a release, a reload follows it.
Environment="PWD={quoted}"
EnvironmentFile=-/etc/outbox/{name}.env
ExecStart={command}
# SIGHUP replaces the workers, one by one, by new ones with the present code.
ExecReload=/bin/kill -HUP $MAINPID
# Only the parent gets the signal: it stops its workers, which have 30 seconds.
KillMode=mixed
TimeoutStopSec=45
Restart=on-failure
RestartSec=5
# Wrong usage: a restart would fail in the same way.
RestartPreventExitStatus=2

[Install]
WantedBy=multi-user.target
"""

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_QUEUE = re.compile(r"[\w.:@/+-]+", re.ASCII)
_TOPIC = re.compile(r"[\w.:@/+*#-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Generated:
    """The files for one consumer.

    Attributes:
        name: the name of the consumer, such as ``order-mails``.
        queue: its queue.
        topics: the topics of its queue, besides the queue's name.
        module: the name of its module.
    """

    name: str
    queue: str
    topics: Sequence[str]
    module: str

    def check(self) -> None:
        """Check that the names can be written into source files.

        Raises:
            UsageError: one can't.
        """
        if not _NAME.fullmatch(self.name) or keyword.iskeyword(self.name):
            raise UsageError(
                f"{self.name!r} is not a name for a consumer; use lower case letters, digits and "
                "hyphens, such as invoices or order-mails"
            )
        if not _QUEUE.fullmatch(self.queue) or len(self.queue) > 200:
            raise UsageError(
                f"{self.queue!r} is not a name for a queue; use letters, digits, . _ -"
            )
        for topic in self.topics:
            if not _TOPIC.fullmatch(topic):
                raise UsageError(f"{topic!r} is not a topic; write it like order.placed or order.*")

    @property
    def kind(self) -> str:
        """The name of the class."""
        return "".join(word.capitalize() for word in re.split("[-_]", self.name))

    def consumer(self) -> str:
        """Return the source of the consumer."""
        topics = ", ".join(f'"{topic}"' for topic in self.topics)
        comma = "," if len(self.topics) == 1 else ""
        return self._filled(_CONSUMER, topics=f"({topics}{comma})")

    def test(self, *, django: bool) -> str:
        """Return the source of its test: for pytest, or for Django's test runner."""
        target = self.topics[0] if self.topics else self.queue
        target = re.sub(r"[*#]", "example", target)
        return self._filled(_DJANGO_TEST if django else _TEST, target=target)

    def unit(self, folder: str, command: Sequence[str]) -> str:
        """Return the unit for systemd.

        Args:
            folder: the working directory, an absolute path.
            command: the program and its arguments.
        """
        # systemd.service(5): % and $ have a meaning.
        line = shlex.join(command).replace("%", "%%").replace("$", "$$")
        folder = folder.replace("%", "%%")
        quoted = folder.replace("\\", "\\\\").replace('"', '\\"')
        unit = f"outbox-{self.name}"
        return self._filled(_UNIT, folder=folder, quoted=quoted, command=line, unit=unit)

    def _filled(self, template: str, **values: str) -> str:
        return template.format(
            name=self.name, queue=self.queue, module=self.module, kind=self.kind, **values
        )
