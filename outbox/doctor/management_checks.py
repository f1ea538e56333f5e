"""Checks of what only RabbitMQ's management API shows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outbox.doctor.broker_probe import queues_of
from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotChecked, Problem
from outbox.messages.dead_letters import PARKING_QUEUE

__all__ = ["CHECKS", "policy_of"]

_LIMITS = ("max-length", "max-length-bytes")
_CLASHES = {
    "delivery-limit": "gives up messages that came back a few times, beside the retry policy",
    "message-ttl": "drops messages that wait",
    "expires": "deletes the queue while it is unused",
    "dead-letter-exchange": "sends dead letters elsewhere",
}


def _bindings(examined: Examined) -> Iterator[Problem]:
    management = examined.management
    for spec in examined.specs:
        wanted = {spec.name, *spec.topics}
        for exchange, key in management.bindings(spec.name):
            if exchange == spec.exchange and exchange and key not in wanted:
                yield Problem(
                    "warning",
                    f"the queue {spec.name!r} is bound to {exchange!r} with {key!r}, which is not "
                    "in the topics of its consumer",
                )


def _policies(examined: Examined) -> Iterator[Problem]:
    management = examined.management
    specs, unknown = [], None
    try:
        specs = list(examined.specs)
    except NotChecked as error:
        unknown = error
    policies = management.policies()
    consumed = {spec.name for spec in specs}
    for name in queues_of(specs):
        queue = management.queue(name)
        definition = policy_of(name, queue, policies)
        for key, what in _CLASHES.items():
            if key in definition:
                yield Problem(
                    "warning",
                    f"a policy gives {name!r} {key} {definition[key]!r}, which {what}",
                )
        overflow = definition.get("overflow")
        drops = overflow != "reject-publish" if overflow or name not in consumed else False
        for key in _LIMITS:
            if key in definition and drops:
                yield Problem(
                    "warning",
                    f"a policy gives {name!r} {key} {definition[key]!r} without overflow "
                    "reject-publish, so that its oldest messages are dropped",
                )
    if unknown is not None:
        raise NotChecked(f"only {PARKING_QUEUE!r} was looked at: {unknown}")


def policy_of(
    name: str, queue: Mapping[str, Any] | None, policies: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return the definition of the policies that apply to a queue, or would if it existed."""
    # The API names it only some seconds after a policy has changed.
    effective = queue.get("effective_policy_definition") if queue is not None else None
    if effective and isinstance(effective, Mapping):
        return effective
    matching = []
    for policy in policies:
        with contextlib.suppress(re.error):
            if policy.get("apply-to") != "exchanges" and re.search(policy["pattern"], name):
                matching.append(policy)
    if not matching:
        return {}
    strongest = max(matching, key=lambda policy: int(policy.get("priority", 0)))
    definition = strongest.get("definition") or {}
    return definition if isinstance(definition, Mapping) else {}


def _alarms(examined: Examined) -> Iterator[Problem]:
    written = examined.written
    if written.blocked is not None:
        yield Problem("error", f"the broker takes no messages: {written.blocked}")
        return
    # Without the API it is known only that this node isn't blocked now.
    reason = examined.management.failed_health_check("alarms")
    if reason is not None:
        yield Problem("error", f"an alarm is in effect in the cluster: {reason}")


def _replicas(examined: Examined) -> Iterator[Problem]:
    management = examined.management
    try:
        names = queues_of(examined.specs)
    except NotChecked:
        names = [PARKING_QUEUE]
    leaders: dict[str, int] = {}
    for name in names:
        queue = management.queue(name)
        if queue is None or queue.get("type") != "quorum":
            continue
        members, online = queue.get("members") or [], queue.get("online") or []
        if members and 2 * len(online) <= len(members):
            yield Problem(
                "error",
                f"the queue {name!r} has lost its majority: {len(online)} of {len(members)} "
                "members are online",
            )
        elif len(online) < len(members):
            yield Problem(
                "warning",
                f"{len(online)} of {len(members)} members of the queue {name!r} are online",
            )
        if len(members) > 1 and queue.get("leader"):
            leaders[queue["leader"]] = leaders.get(queue["leader"], 0) + 1
    if len(leaders) == 1 and sum(leaders.values()) > 2:
        [node] = leaders
        yield Problem(
            "warning",
            f"all leaders of the quorum queues are on {node}",
            "Spread them: rabbitmq-queues rebalance quorum.",
        )
    reason = management.failed_health_check("node-is-quorum-critical")
    if reason is not None:
        yield Problem("warning", f"queues would lose their majority without this node: {reason}")


CHECKS = (
    Check(
        "OBX108",
        "bindings beside the consumers' topics",
        "If they are left over from earlier topics, delete them: rabbitmqadmin delete binding.",
        _bindings,
    ),
    Check(
        "OBX110",
        "policies that clash with outbox's queues",
        "Exclude these queues from the policy's pattern, or give them a policy of higher priority "
        "without this key.",
        _policies,
    ),
    Check(
        "OBX111",
        "alarms of memory and disk",
        "Free memory or disk space on the broker, or consume what waits.",
        _alarms,
    ),
    Check(
        "OBX112",
        "members and leaders of quorum queues",
        "Start the nodes that are missing, or replace them: rabbitmq-queues grow.",
        _replicas,
    ),
)
