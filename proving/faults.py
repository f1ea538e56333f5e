"""The faults, and their random schedule."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proving.proxy import BLOCKED, UNBLOCKED, Frame, Way, channel_close, connection_close

if TYPE_CHECKING:
    from proving.ground import Ground

__all__ = ["FAULTS", "Fault", "Planned", "plan"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: the name in the ledger.
        begin: a function that causes the fault.
        end: a function that ends it.
        seconds: the minimum and maximum duration.
        track: the track; faults of one track never overlap, faults of different tracks may.
    """

    name: str
    begin: Callable[[Ground], object]
    end: Callable[[Ground], object] = lambda ground: None
    seconds: tuple[float, float] = (0.0, 0.0)
    track: str = "link"


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault in the schedule.

    Attributes:
        at: the seconds from the start until the fault begins.
        until: the seconds from the start until it ends.
        fault: the fault.
    """

    at: float
    until: float
    fault: Fault


def plan(
    chance: random.Random, seconds: float, faults: Sequence[Fault], pause: tuple[float, float]
) -> list[Planned]:
    """Return a random schedule of ``seconds``, in order of ``at``.

    Args:
        chance: the source of randomness.
        seconds: the length of the schedule; every fault has ended by then.
        faults: the faults to choose from; each happens once before any happens twice.
        pause: the minimum and maximum seconds between two faults of one track.
    """
    planned = []
    for track in sorted({fault.track for fault in faults}):
        of_track = [fault for fault in faults if fault.track == track]
        waiting: list[Fault] = []
        at = chance.uniform(*pause)
        while True:
            if not waiting:
                waiting = chance.sample(of_track, len(of_track))
            fault = waiting.pop()
            until = at + chance.uniform(*fault.seconds)
            if until > seconds:
                break
            planned.append(Planned(at, until, fault))
            at = until + chance.uniform(*pause)
    return sorted(planned, key=lambda each: each.at)


def _at_method(way: Way, class_id: int, method_id: int) -> Callable[[Frame], bool]:
    return lambda frame: frame.way is way and frame.method == (class_id, method_id)


def _with(text: bytes) -> Callable[[Frame], bool]:
    return lambda piece: piece.way is Way.UP and text in piece.data


def _block(ground: Ground) -> None:
    ground.proxy.inject(BLOCKED)


def _unblock(ground: Ground) -> None:
    ground.proxy.inject(UNBLOCKED)


def _kill_holding_worker(ground: Ground) -> None:
    """Kill the worker while it holds messages, since their follow-on events can't be published."""
    _block(ground)
    time.sleep(0.5)
    ground.stop("worker", "kill")


def _unblock_new_worker(ground: Ground) -> None:
    _unblock(ground)
    ground.start("worker")


def _kill_spooled_while_away(ground: Ground) -> None:
    """Kill the script with a spool once it has kept events there."""
    ground.proxy.refuse()
    time.sleep(1.0)
    ground.stop("spooled", "kill")


def _back_for_new_spooled(ground: Ground) -> None:
    ground.proxy.heal()
    ground.start("spooled")


_SHORT, _LONG = (0.2, 1.5), (1.0, 6.0)

FAULTS: Sequence[Fault] = (
    Fault("cut", lambda on: on.proxy.cut()),
    Fault("cut at publish", lambda on: on.proxy.cut_at(_at_method(Way.UP, 60, 40))),
    Fault("cut at confirm", lambda on: on.proxy.cut_at(_at_method(Way.DOWN, 60, 80))),
    Fault("cut at delivery", lambda on: on.proxy.cut_at(_at_method(Way.DOWN, 60, 60))),
    Fault("cut at ack", lambda on: on.proxy.cut_at(_at_method(Way.UP, 60, 80))),
    Fault("refuse", lambda on: on.proxy.refuse(), lambda on: on.proxy.heal(), _LONG),
    Fault(
        "black hole up", lambda on: on.proxy.black_hole(Way.UP), lambda on: on.proxy.heal(), _LONG
    ),
    Fault(
        "black hole down",
        lambda on: on.proxy.black_hole(Way.DOWN),
        lambda on: on.proxy.heal(),
        _LONG,
    ),
    Fault("black hole", lambda on: on.proxy.black_hole(), lambda on: on.proxy.heal(), _LONG),
    Fault("delay", lambda on: on.delay(0.1), lambda on: on.delay(0.0), _LONG),
    Fault("blocked", _block, _unblock, _LONG),
    Fault("connection closed", lambda on: on.proxy.inject(connection_close(320, "forced"))),
    Fault("channel closed", lambda on: on.proxy.inject(channel_close(541, "wrong"))),
    Fault("garbage", lambda on: on.proxy.inject(b"\x09\x00\x00\x00\x00\x00\x01!!")),
    Fault("kill broker", lambda on: on.broker.kill(), lambda on: on.broker.start(), _SHORT),
    Fault("stop broker", lambda on: on.broker.shut_down(), lambda on: on.broker.start(), _SHORT),
    Fault("freeze broker", lambda on: on.broker.pause(), lambda on: on.broker.resume(), _LONG),
    Fault("kill holding worker", _kill_holding_worker, _unblock_new_worker, _SHORT),
    Fault("kill spooled while away", _kill_spooled_while_away, _back_for_new_spooled, _SHORT),
    Fault("unbind", lambda on: on.unbind(), lambda on: on.bind(), _LONG, "queues"),
    Fault(
        "no permission",
        lambda on: on.permit(writing=False),
        lambda on: on.permit(writing=True),
        _LONG,
    ),
    Fault(
        "full queue", lambda on: on.bounded.pause(), lambda on: on.bounded.resume(), _LONG, "queues"
    ),
    Fault("cut database", lambda on: on.database.proxy.cut(), track="database"),
    Fault(
        "cut database at delete",
        lambda on: on.database.proxy.cut_at(_with(b"DELETE FROM outbox_events")),
        track="database",
    ),
    Fault(
        "cut database at commit",
        lambda on: on.database.proxy.cut_at(_with(b"COMMIT")),
        track="database",
    ),
    Fault(
        "refuse database",
        lambda on: on.database.proxy.refuse(),
        lambda on: on.database.proxy.heal(),
        _LONG,
        "database",
    ),
    Fault(
        "black hole before database",
        lambda on: on.database.proxy.black_hole(),
        lambda on: on.database.proxy.heal(),
        _SHORT,
        "database",
    ),
    Fault(
        "kill database",
        lambda on: on.database.server.kill(),
        lambda on: on.database.server.start(),
        _SHORT,
        "database",
    ),
    *(
        Fault(
            f"{way} {kind}",
            lambda on, kind=kind, way=way: on.stop(kind, way),  # type: ignore[misc]
            lambda on, kind=kind: on.start(kind),  # type: ignore[misc]
            _SHORT,
            "processes",
        )
        for kind in (
            "script",
            "spooled",
            "wsgi",
            "asgi",
            "prefork",
            "durable",
            "django",
            "relay",
            "relay2",
            "tenants",
            "worker",
            "caller",
            "calls",
        )
        for way in ("kill", "terminate")
        # Celery may kill its children when it ends, and their events with them.
        if (way, kind) != ("terminate", "prefork")
    ),
)
"""All faults."""


def named(names: Iterable[str]) -> list[Fault]:
    """Return the faults with these names.

    Raises:
        KeyError: no fault has that name.
    """
    by_name = {fault.name: fault for fault in FAULTS}
    return [by_name[name] for name in names]
