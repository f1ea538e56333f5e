"""Checks of the exchanges and queues in RabbitMQ, and of what the user may do with them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from outbox.doctor.broker_probe import Refusal
from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotChecked, Problem
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.transports.rabbitmq.parameters import VERSION_PROPERTY
from outbox.transports.rabbitmq.topology import obstacle

__all__ = ["CHECKS"]

_NONE_RUNS = "no worker of these modules runs"


def _specs(examined: Examined) -> tuple[Sequence[QueueSpec], NotChecked | None]:
    """Return the queues of the consumers, and why they are unknown, if they are."""
    try:
        return examined.specs, None
    except NotChecked as error:
        return (), error


def _permissions(examined: Examined) -> Iterator[Problem]:
    settings, probe, written = examined.settings, examined.probe, examined.written
    specs, unknown = _specs(examined)
    creates = settings.declare == "create"
    refused: list[tuple[str, Refusal | None]] = []
    exchanges = dict.fromkeys([settings.exchange, *(spec.exchange for spec in specs)])
    if creates:
        refused += [
            ("configure", probe.may_declare_exchange(exchange))
            for exchange in exchanges
            if exchange and not exchange.startswith("amq.")
        ]
        if settings.unroutable == "park":
            refused.append(("configure", probe.may_declare_queue(PARKING_QUEUE)))
    for spec in specs:
        if creates:
            names = (spec.name, dead_letter_queue(spec.name))
            refused += [("configure", probe.may_declare_queue(name)) for name in names]
            if spec.exchange:
                refused.append(("read or write", probe.may_bind(spec.name, spec.exchange)))
        refused.append(("read", probe.may_consume(spec.name)))
    refused += [
        ("write", refusal)
        for refusal in written.refused.values()
        if refusal is not None and refusal.text.startswith("ACCESS_REFUSED")
    ]
    for permission, refusal in dict.fromkeys(refused):
        if refusal is not None:
            yield Problem("error", f"no {permission} permission: {refusal.text}")
    if written.blocked is not None and len(written.refused) < len(exchanges) + 1:
        raise NotChecked("the broker takes no messages (OBX111), so publishing was not tried")
    if unknown is not None:
        raise NotChecked(f"those of queues: {unknown}")


def _arguments(examined: Examined) -> Iterator[Problem]:
    settings, probe = examined.settings, examined.probe
    specs, unknown = _specs(examined)
    creates = settings.declare == "create"
    exchanges = dict.fromkeys([settings.exchange, *(spec.exchange for spec in specs)])
    for exchange in exchanges:
        if not exchange or exchange.startswith("amq."):
            continue
        if probe.has_exchange(exchange):
            refusal = probe.difference_of_exchange(exchange) if creates else None
            if refusal is not None:
                yield Problem(
                    "error",
                    f"the exchange {exchange!r} is not as outbox declares it: {refusal.text}",
                    "Delete it, or use another one (OUTBOX_EXCHANGE).",
                )
        elif not creates:
            yield Problem(
                "error",
                f"the exchange {exchange!r} does not exist, and declare is {settings.declare!r}",
                "Create it: a durable topic exchange.",
            )
    for spec in specs:
        if (reason := obstacle(spec, probe.version)) is not None:
            yield Problem("error", reason, "Change max_priority or queue_type of the consumer.")
        if creates:
            for queue, refusal in probe.differences(spec):
                yield Problem(
                    "error", f"the queue {queue!r} exists with other arguments: {refusal.text}"
                )
            continue
        for queue in (spec.name, dead_letter_queue(spec.name)):
            if probe.queue(queue) is None:
                yield Problem(
                    "error",
                    f"the queue {queue!r} does not exist, and declare is {settings.declare!r}",
                    "Create it with the arguments in docs/wire-format.md.",
                )
    if unknown is not None:
        raise NotChecked(f"those of queues: {unknown}")


def _without_consumer(examined: Examined) -> Iterator[Problem]:
    if not examined.is_rabbitmq:
        from outbox.doctor.broker_database_checks import without_consumer

        yield from without_consumer(examined)
        return
    probe = examined.probe
    specs, unknown = _specs(examined)
    for spec in specs:
        queue = probe.queue(spec.name)
        if queue is not None and queue.messages and not queue.consumers:
            yield Problem(
                "warning",
                f"{_messages(queue.messages)} wait in {spec.name!r}, and no worker consumes it",
                "Start outbox-consume with the consumer of this queue.",
            )
    if unknown is not None:
        raise unknown
    management = examined.management
    ours = {spec.name for spec in specs}
    bound: set[str] = set()
    for exchange in {spec.exchange for spec in specs} | {examined.settings.exchange}:
        bound |= management.bound_queues(exchange) if exchange else set()
    for name in sorted(bound - ours):
        queue = probe.queue(name)
        if queue is not None and queue.messages and not queue.consumers:
            yield Problem(
                "warning",
                f"{_messages(queue.messages)} wait in {name!r}, which no consumer of these "
                "modules has",
            )


def _dead_letters(examined: Examined) -> Iterator[Problem]:
    with contextlib.suppress(NotChecked):  # OBX201 says why
        yield from _dead_rows(examined)
    if not examined.is_rabbitmq:
        from outbox.doctor.broker_database_checks import dead_letters

        yield from dead_letters(examined)
        return
    probe = examined.probe
    parked = probe.queue(PARKING_QUEUE)
    if parked is not None and parked.messages:
        yield Problem(
            "warning",
            f"{_messages(parked.messages, 'event')} without a queue in {PARKING_QUEUE!r}",
            "Look with `outbox parked list`; correct topics or targets, then `outbox parked "
            "replay`.",
        )
    specs, unknown = _specs(examined)
    for spec in specs:
        name = dead_letter_queue(spec.name)
        dead = probe.queue(name)
        if dead is not None and dead.messages:
            yield Problem(
                "warning",
                f"{_messages(dead.messages, 'dead letter')} in {name!r}",
                f"Look with `outbox parked list --queue {name}`; then replay or purge them.",
            )
    if unknown is not None:
        raise NotChecked(f"the dead letters: {unknown}")


def _dead_rows(examined: Examined) -> Iterator[Problem]:
    examined.engine  # noqa: B018  raises if there is none, or no SQLAlchemy to import
    from outbox.doctor.database_checks import dead_rows

    yield from dead_rows(examined)


def _workers(examined: Examined) -> Iterator[Problem]:
    if not examined.is_rabbitmq:
        from outbox.doctor.broker_database_checks import workers

        found = workers(examined)
        if not any(found.values()):
            raise NotChecked(_NONE_RUNS)
        for name, versions in found.items():
            if not versions:
                yield _unconsumed(name)
            yield from _mixed(name, versions)
        return
    probe = examined.probe
    queues = {spec.name: probe.queue(spec.name) for spec in examined.specs}
    if not any(queue is not None and queue.consumers for queue in queues.values()):
        raise NotChecked(_NONE_RUNS)
    for name, queue in queues.items():
        if queue is None or (not queue.consumers and not queue.messages):
            yield _unconsumed(name)
    management = examined.management
    for name in queues:
        clients = management.consumers_of(name)
        yield from _mixed(name, [each.get(VERSION_PROPERTY) for each in clients])


def _unconsumed(queue: str) -> Problem:
    return Problem("warning", f"no worker consumes {queue!r}, while others of these modules run")


def _mixed(queue: str, versions: Sequence[object]) -> Iterator[Problem]:
    """Yield a problem if the workers of a queue have several versions of outbox.

    Args:
        queue: its name.
        versions: that of each worker; what isn't text is unknown.
    """
    counts = Counter(version for version in versions if isinstance(version, str) and version)
    if len(counts) > 1:
        listed = ", ".join(f"{version:.40} ({n})" for version, n in sorted(counts.items()))
        yield Problem(
            "warning",
            f"the workers of {queue!r} have different versions of outbox: {listed}",
            "Restart those with the earlier version, if a deployment isn't under way.",
        )


def _messages(count: int, what: str = "message") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


CHECKS = (
    Check(
        "OBX105",
        "the user's permissions",
        "Grant it: rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ, each a regular "
        "expression for names of queues and exchanges.",
        _permissions,
    ),
    Check(
        "OBX106",
        "the arguments of exchanges and queues",
        "Arguments can't be changed: empty the queue and delete it, so that the worker declares it "
        "again; or give the consumer the max_priority and queue_type of the queue.",
        _arguments,
    ),
    Check(
        "OBX107",
        "queues with messages and no consumer",
        "Name the module with its consumer; or, if it is no longer used, delete the queue.",
        _without_consumer,
    ),
    Check(
        "OBX109",
        "dead letters and parked events",
        "Look at them with `outbox parked list`, or `outbox status`.",
        _dead_letters,
    ),
    Check(
        "OBX302",
        "the workers of the queues, and their versions",
        "Start a worker without -Q, or one with this queue.",
        _workers,
    ),
)
