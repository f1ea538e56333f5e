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
  no queue would have, ``dead`` what a consumer gave up, after so many ``attempts``), with its
  ``key`` and ``id``.

Consumers write:

- ``handling``: an ``attempt`` with the event ``key`` begins.
- ``failed``: it fails now, and is not to be repeated before ``delay`` seconds are over;
  ``redelivered`` as the broker says.

The driver writes ``killed`` when it has killed the process ``process``, ``fault`` when something
went wrong, and what the consumers' database has in the end: an ``effect`` for each thing done.

``work`` says what a consumer does with the event: with ``follow`` it publishes one event, whose key
is the first one's with ``>`` appended; with ``fail`` it enqueues that event and then fails, each
time; with ``retry`` it fails at first, and follows then; with ``slow`` it takes too long at first.
With ``effect`` in its intent it has an effect besides, once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from proving.history import Record

__all__ = ["FOLLOW_ON", "MAX_ATTEMPTS", "Verdict", "check"]

FOLLOW_ON = ">"
MAX_ATTEMPTS = 3
_SAME_CLOCK = 0.002  # seconds by which one process may read the time later than another


@dataclass
class Verdict:
    """The ledger.

    Attributes:
        counts: by what is counted.
        lost: committed events that came out nowhere, unless nobody had confirmed them and their
            writer was killed; follow-on events, effects and dead letters that never came.
        phantom: what came out though it was rolled back, was never committed, or follows from a
            failed attempt.
        renamed: keys that came out with another id than they were enqueued with, or with several.
        disordered: what came out for the first time after something newer of its lane.
        twice: effects of one event that are there more than once.
        early: attempts that began before their delay was over.
        endless: events that were tried more often than they may be, or given up earlier.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    endless: list[str] = field(default_factory=list)

    @property
    def findings(self) -> dict[str, list[str]]:
        """Everything that must not be, by kind."""
        return {
            "lost": self.lost,
            "phantom": self.phantom,
            "new id": self.renamed,
            "out of order": self.disordered,
            "done twice": self.twice,
            "too early": self.early,
            "wrong number of attempts": self.endless,
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
    _check_effects(verdict, intents, committed, places, history)
    _check_attempts(verdict, history, deliveries)
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
    if work in ("follow", "retry", "slow"):
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


def _check_effects(
    verdict: Verdict,
    intents: dict[str, Record],
    committed: set[str],
    places: dict[str, set[str]],
    history: Iterable[Record],
) -> None:
    """Check what is in the consumers' database: once what was to be done, and nothing else."""
    done = Counter(one.facts["key"] for one in history if one.what == "effect")
    verdict.counts["effects"] = len(done)
    for key, intent in intents.items():
        is_wanted = intent.facts["unit"] in committed and intent.facts.get("work") != "fail"
        if not is_wanted and key in done:
            verdict.phantom.append(f"{key} was done, and was not to be")
        elif is_wanted and intent.facts.get("effect") and key in places and key not in done:
            verdict.lost.append(f"{key} has no effect")
    verdict.twice += [f"{key} was done {times} times" for key, times in done.items() if times > 1]


def _check_attempts(
    verdict: Verdict, history: Iterable[Record], deliveries: Iterable[Record]
) -> None:
    """Check how often something was tried, and when."""
    failed: dict[tuple[str, int], float] = {}  # when, at first, and with the delay on top
    begun: list[tuple[float, str, int]] = []
    fresh: Counter[str] = Counter()
    broken = 0
    for one in history:
        if one.what == "failed":
            this = one.facts["key"], one.facts["attempt"]
            failed[this] = min(failed.get(this, math.inf), one.at + one.facts["delay"])
            fresh[one.facts["key"]] += this[1] == 1 and not one.facts["redelivered"]
        elif one.what == "handling":
            begun.append((one.at, one.facts["key"], one.facts["attempt"]))
        elif one.what == "fault" and "broker" in one.facts["name"]:
            broken += 1  # it may forget that it has delivered something
    for at, key, attempt in begun:
        if attempt > MAX_ATTEMPTS:
            verdict.endless.append(f"{key} was tried a time {attempt}")
        not_before = failed.get((key, attempt - 1))
        if not_before is not None and at < not_before - _SAME_CLOCK:
            verdict.early.append(f"{key} was tried {not_before - at:.3f} s too early")
    verdict.counts["attempts"] = len(begun)
    verdict.counts["repeated attempts"] = sum(attempt > 1 for _, _, attempt in begun)
    came = Counter(one.facts["key"] for one in deliveries if one.facts["where"] == "ledger")
    for key, times in fresh.items():
        # Whatever is published twice, by a publisher that has seen no confirm, begins twice.
        if times > max(1, came[key]) + broken:
            verdict.endless.append(f"{key} failed {times} times as if it were the first")
    for one in deliveries:
        attempts = one.facts.get("attempts")
        if one.facts["where"] == "dead" and attempts not in (None, MAX_ATTEMPTS):
            verdict.endless.append(f"{one.facts['key']} was given up after {attempts} attempts")


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
