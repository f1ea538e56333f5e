"""Judges a history. Knows the promises, and nothing of the code that is to keep them.

Writers put events into *units* of work and write down:

- ``intent``: an event was enqueued: its ``key`` (the writer's own name for it, which the payload
  carries too), its ``id``, its ``unit``, and what is expected of it: ``lane`` and ``seq``, if the
  order within the lane is promised; ``stored``, if it is in a database and outlives its writer;
  ``work``, see below.
- ``commit`` or ``rollback``: what becomes of the ``unit``, before the library is told; or, where a
  database decides, what that says in the end.
- ``confirm``: the library has said that the events with these ``keys`` are published.

Witnesses, who consume with another library, write:

- ``delivery``: a message came out at ``where`` (``ledger`` where everything goes, ``parked`` what
  no queue would have, ``dead`` what a consumer gave up), with its ``key`` and ``id``.

The driver writes ``killed`` when it has killed the process ``process``.

``work`` says what a consumer does with the event: with ``follow`` it publishes one event, whose key
is the first one's with ``>`` appended; with ``fail`` it enqueues that event and then fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from proving.history import Record

__all__ = ["FOLLOW_ON", "Verdict", "check"]

FOLLOW_ON = ">"


@dataclass
class Verdict:
    """The ledger.

    Attributes:
        counts: by what is counted.
        lost: committed events that came out nowhere, unless nobody had confirmed them and their
            writer was killed; follow-on events and dead letters that never came.
        phantom: what came out though it was rolled back, was never committed, or follows from a
            failed attempt.
        renamed: keys that came out with another id than they were enqueued with, or with several.
        disordered: what came out for the first time after something newer of its lane.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)

    @property
    def findings(self) -> dict[str, list[str]]:
        """Everything that must not be, by kind."""
        return {
            "lost": self.lost,
            "phantom": self.phantom,
            "new id": self.renamed,
            "out of order": self.disordered,
        }

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not any(self.findings.values())


def check(history: Sequence[Record]) -> Verdict:
    """Return the verdict on ``history``."""
    verdict = Verdict()
    intents = {one.facts["key"]: one for one in history if one.what == "intent"}
    committed = _units(history, "commit")
    rolled_back = _units(history, "rollback")
    confirmed = {key for one in history if one.what == "confirm" for key in one.facts["keys"]}
    killed = {one.facts["process"] for one in history if one.what == "killed"}
    deliveries = [one for one in history if one.what == "delivery"]
    places: dict[str, set[str]] = {}
    ids: dict[str, set[str]] = {}
    for delivery in deliveries:
        key = delivery.facts["key"]
        places.setdefault(key, set()).add(delivery.facts["where"])
        ids.setdefault(key, set()).add(delivery.facts["id"])

    for key, intent in intents.items():
        unit = intent.facts["unit"]
        came_out = key in places
        if unit in committed:
            verdict.counts["committed"] += 1
            if came_out:
                verdict.counts["delivered"] += 1
                _check_work(verdict, key, intent, places)
            elif intent.by in killed and key not in confirmed and not intent.facts.get("stored"):
                verdict.counts["excused: unconfirmed, their writer killed"] += 1
            else:
                how = "confirmed" if key in confirmed else "committed"
                verdict.lost.append(f"{key} was {how} and never came out")
        else:
            verdict.counts["rolled back" if unit in rolled_back else "without an end"] += 1
            if came_out:
                how = "was rolled back" if unit in rolled_back else "was never committed"
                verdict.phantom.append(f"{key} {how} and came out")
        if came_out and ids[key] != {intent.facts["id"]}:
            verdict.renamed.append(f"{key}, enqueued as {intent.facts['id']}, was {ids[key]}")

    for key in sorted(places.keys() - intents.keys()):
        if not key.endswith(FOLLOW_ON) or key.removesuffix(FOLLOW_ON) not in intents:
            verdict.phantom.append(f"{key} came out, which nobody enqueued")
        elif len(ids[key]) > 1:
            verdict.renamed.append(f"{key} has the ids {sorted(ids[key])}")
    _check_order(verdict, intents, deliveries)
    verdict.counts["confirmed"] = len(confirmed)
    verdict.counts["parked"] = sum("parked" in where for where in places.values())
    verdict.counts["dead letters"] = sum("dead" in where for where in places.values())
    verdict.counts["second deliveries with the same id"] = len(deliveries) - sum(
        len(where) for where in places.values()
    )
    return verdict


def _units(history: Iterable[Record], what: str) -> set[str]:
    return {one.facts["unit"] for one in history if one.what == what}


def _check_work(verdict: Verdict, key: str, intent: Record, places: dict[str, set[str]]) -> None:
    """Check what a consumer was to make of an event that has come out."""
    work = intent.facts.get("work")
    follow_on = key + FOLLOW_ON
    if work == "follow":
        if follow_on in places:
            verdict.counts["follow-ons"] += 1
        else:
            verdict.lost.append(f"{follow_on}, which follows from {key}, never came out")
        if "dead" in places[key]:
            verdict.phantom.append(f"{key} is among the dead letters, though nothing was wrong")
    elif work == "fail":
        if "dead" not in places[key]:
            verdict.lost.append(f"{key}, which its consumer failed, is not among the dead letters")
        if follow_on in places:
            verdict.phantom.append(f"{follow_on} came out, though its consumer failed")


def _check_order(
    verdict: Verdict, intents: dict[str, Record], deliveries: Iterable[Record]
) -> None:
    newest: dict[str, int] = {}
    seen: set[str] = set()
    for delivery in deliveries:
        key = delivery.facts["key"]
        if delivery.facts["where"] != "ledger" or key in seen or key not in intents:
            continue
        seen.add(key)
        lane, seq = intents[key].facts.get("lane"), intents[key].facts.get("seq", 0)
        if lane is None:
            continue
        if seq < newest.get(lane, -1):
            verdict.disordered.append(f"{key} (number {seq} of {lane}) after {newest[lane]}")
        newest[lane] = max(seq, newest.get(lane, -1))
