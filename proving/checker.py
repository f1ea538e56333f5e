"""The verdict on a history, by the promises alone, without the code that has to keep them.

Writers put events into *units* of work and write down:

- ``intent``: an event was enqueued: its ``key`` (the writer's name for it, also in the payload),
  its ``id``, its ``unit``, and what is expected of it: ``lane`` and ``seq``, if the order within
  the lane is promised; ``stored``, if it is in a database and survives its writer; ``not_before``,
  if it is delayed, in seconds since the epoch; ``routable``, if a queue is always bound for it;
  ``only``, the one place where it may come out; ``once``, if it must not come out twice while
  nothing goes wrong; ``work``, see below.
- ``commit`` or ``rollback``: the end of the ``unit``, written before the library learns of it; or,
  where a database decides, what the database says in the end.
- ``unsure``: the ``unit``, whose intents were written first, may be interrupted or refused. Unless
  it also has one of these ends, all its events come out or none.
- ``confirm``: the library has reported the events with these ``keys`` as published, or
  as kept in a spool.

Witnesses, which consume with another library, write:

- ``delivery``: a message with ``key`` and ``id`` was delivered at ``where``: in the ``ledger``,
  which gets everything; ``parked``, when it was unroutable; or ``dead``, when a consumer gave it up
  after ``attempts`` attempts.

Consumers write:

- ``handling``: an ``attempt`` for the event ``key`` begins.
- ``failed``: the attempt fails, and must not be repeated for ``delay`` seconds; with the broker's
  ``redelivered``.

The driver writes ``killed`` when it has killed the process ``process``, ``fault`` when it begins a
fault, ``astray`` when a program didn't end as it should, with the reason in ``how``, and in the end
an ``effect`` for each row that consumers left in their database.

``work`` says what a consumer does with the event: with ``follow`` it publishes one event, whose key
is the original key with ``>`` appended; with ``fail`` it enqueues that event and then fails, every
time; with ``retry`` it fails at first, then follows; with ``slow`` it takes too long at first.
With ``effect`` in its intent the event also has one effect in the database.

Tasks are events whose delivery, ``where`` is ``run``, they write down themselves. An intent has the
name of the ``task``. Who calls them writes ``cancelling`` before it cancels one, and ``cancelled``
if that succeeded, with the time in ``since`` when it tried. In the end the driver writes a
``result`` for each row in the table of results: the task's ``id``, ``status``, ``value`` and
``error``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from proving.history import Record, process_of

__all__ = ["FOLLOW_ON", "MAX_ATTEMPTS", "Verdict", "check"]

FOLLOW_ON = ">"
MAX_ATTEMPTS = 3
_PROMPT = 5.0  # seconds within which an event comes out while nothing goes wrong
_UNKEPT, _COMMITTING, _IN_SESSION = "unkept", "committing", "in_session"  # tasks
_SAME_CLOCK = 0.002  # seconds by which two processes may read the time differently


@dataclass
class Verdict:
    """The ledger.

    Attributes:
        counts: the counts by name.
        lost: committed events that were never delivered, unless their writer was killed before
            they were confirmed; missing follow-on events, effects and dead letters.
        misplaced: events that were parked although a queue was bound for them, or that came out
            where they can't.
        torn: units of work of which some events were delivered and some were not.
        phantom: delivered events that were rolled back, never committed, or enqueued by a failed
            attempt.
        renamed: keys delivered with several ids, or another than they were enqueued with.
        unsettled: tasks whose results are not as they ended, such as those that still run.
        disordered: events first delivered after a newer event of their lane.
        delayed: events that came out long after their commit in a history without any fault.
        repeated: events delivered twice in a history without any fault.
        twice: events with more than one effect.
        early: attempts that began, and events that came out, before their delay was over.
        endless: events with more attempts than allowed, or given up too soon.
        astray: programs that didn't end as they should.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    delayed: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    endless: list[str] = field(default_factory=list)
    astray: list[str] = field(default_factory=list)

    @property
    def findings(self) -> dict[str, list[str]]:
        """The broken promises, by kind."""
        return {
            "lost": self.lost,
            "misplaced": self.misplaced,
            "torn apart": self.torn,
            "phantom": self.phantom,
            "new id": self.renamed,
            "wrong result": self.unsettled,
            "out of order": self.disordered,
            "too late": self.delayed,
            "delivered twice": self.repeated,
            "done twice": self.twice,
            "too early": self.early,
            "wrong number of attempts": self.endless,
            "did not end": self.astray,
        }

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not any(self.findings.values())


def check(history: Sequence[Record]) -> Verdict:
    """Return the verdict on ``history``."""
    verdict = Verdict()
    intents = {each.facts["key"]: each for each in history if each.what == "intent"}
    committed = _units(history, "commit")
    rolled_back = _units(history, "rollback")
    unsure = _units(history, "unsure") - committed - rolled_back
    confirmed = {key for each in history if each.what == "confirm" for key in each.facts["keys"]}
    killed = {each.facts["process"] for each in history if each.what == "killed"}
    asked = {each.facts["key"] for each in history if each.what == "cancelling"}
    stopped = _stopped(history, intents)
    deliveries = [each for each in history if each.what == "delivery"]
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
                _check_place(verdict, key, intent, places)
                if key not in stopped:
                    _check_work(verdict, key, intent, places)
            elif key in asked and (key in stopped or key not in confirmed):
                verdict.counts["cancelled"] += 1
            elif (
                process_of(intent.by) in killed
                and key not in confirmed
                and not intent.facts.get("stored")
            ):
                verdict.counts["excused: unconfirmed, writer killed"] += 1
            else:
                how = "confirmed" if key in confirmed else "committed"
                verdict.lost.append(f"{key} was {how} and never came out")
        elif unit in unsure:
            verdict.counts["interrupted"] += 1
            if came_out:
                _check_place(verdict, key, intent, places)
                _check_work(verdict, key, intent, places)
        else:
            verdict.counts["rolled back" if unit in rolled_back else "without an end"] += 1
            if came_out:
                how = "was rolled back" if unit in rolled_back else "was never committed"
                verdict.phantom.append(f"{key} {how} and came out")
        if came_out and ids[key] != {intent.facts["id"]}:
            verdict.renamed.append(f"{key}, enqueued as {intent.facts['id']}, was {ids[key]}")

    for key in sorted(places.keys() - intents.keys()):
        if not key.endswith(FOLLOW_ON) or key.removesuffix(FOLLOW_ON) not in intents:
            verdict.phantom.append(f"{key} came out and was never enqueued")
        elif len(ids[key]) > 1:
            verdict.renamed.append(f"{key} has the ids {sorted(ids[key])}")
    _check_whole(verdict, intents, unsure, places, killed)
    _check_order(verdict, intents, deliveries)
    _check_deliveries(verdict, history, intents, deliveries)
    _check_effects(*(verdict, intents, committed | unsure, places.keys() - stopped, history))
    _check_attempts(verdict, history, deliveries)
    _check_results(verdict, history, intents, places)
    _check_cancelled(verdict, history, intents)
    verdict.counts["confirmed"] = len(confirmed)
    verdict.counts["parked"] = sum("parked" in where for where in places.values())
    verdict.counts["dead letters"] = sum("dead" in where for where in places.values())
    verdict.counts["second deliveries with the same id"] = len(deliveries) - sum(
        len(where) for where in places.values()
    )
    return verdict


def _units(history: Iterable[Record], what: str) -> set[str]:
    return {each.facts["unit"] for each in history if each.what == what}


def _stopped(history: Iterable[Record], intents: Mapping[str, Record]) -> set[str]:
    """Return the keys of the tasks that were cancelled, also of those whose caller can't know."""
    rows = {
        each.facts["id"]
        for each in history
        if each.what == "result" and each.facts["status"] == "cancelled"
    }
    kept = {key for key, intent in intents.items() if intent.facts["id"] in rows}
    return kept | {each.facts["key"] for each in history if each.what == "cancelled"}


def _check_place(verdict: Verdict, key: str, intent: Record, places: dict[str, set[str]]) -> None:
    """Check that a delivered event came out where its address leads."""
    only = intent.facts.get("only")
    if only is not None and places[key] != {only}:
        verdict.misplaced.append(f"{key}, which can only be {only}, was in {sorted(places[key])}")
    if intent.facts.get("routable") and places[key] == {"parked"}:
        verdict.misplaced.append(f"{key} was parked, though a queue is bound for it")


def _check_whole(
    verdict: Verdict,
    intents: dict[str, Record],
    unsure: set[str],
    places: dict[str, set[str]],
    killed: set[str],
) -> None:
    """Check that of an interrupted unit all came out or nothing, unless its writer was killed."""
    of_unit: dict[str, list[Record]] = {}
    for intent in intents.values():
        if intent.facts["unit"] in unsure and process_of(intent.by) not in killed:
            of_unit.setdefault(intent.facts["unit"], []).append(intent)
    for unit, its in of_unit.items():
        missing = [intent.facts["key"] for intent in its if intent.facts["key"] not in places]
        if 0 < len(missing) < len(its):
            verdict.torn.append(f"{unit} came out without {missing}")


def _check_deliveries(
    verdict: Verdict,
    history: Iterable[Record],
    intents: dict[str, Record],
    deliveries: Iterable[Record],
) -> None:
    """Check the times of deliveries, and how often each event came where nothing went wrong."""
    again: Counter[str] = Counter()
    waits: dict[str, float] = {}
    committed = {each.facts["unit"]: each.at for each in history if each.what == "commit"}
    for delivery in deliveries:
        key, where = delivery.facts["key"], delivery.facts["where"]
        intent = intents.get(key)
        if intent is None or where == "dead":
            continue
        due = intent.facts.get("not_before", -math.inf)
        if delivery.at < due - _SAME_CLOCK:
            verdict.early.append(f"{key} came out {due - delivery.at:.3f} s too early")
        again[key] += bool(intent.facts.get("once"))
        if intent.facts.get("routable") and not intent.facts.get("stored"):
            waits.setdefault(key, delivery.at - committed.get(intent.facts["unit"], math.inf))
    if not any(each.what in ("fault", "killed") for each in history):
        twice = [(key, times) for key, times in again.items() if times > 1]
        verdict.repeated += [f"{key} came {times} times" for key, times in twice]
        slow = [(key, wait) for key, wait in waits.items() if wait > _PROMPT]
        verdict.delayed += [f"{key} came {wait:.1f} s after its commit" for key, wait in slow]
    verdict.astray += [
        f"{each.facts['process']} {each.facts['how']}" for each in history if each.what == "astray"
    ]


def _check_work(verdict: Verdict, key: str, intent: Record, places: dict[str, set[str]]) -> None:
    """Check the results that a consumer owes for a delivered event."""
    work = intent.facts.get("work")
    follow_on = key + FOLLOW_ON
    if work in ("follow", "retry", "slow"):
        if follow_on in places:
            verdict.counts["follow-ons"] += 1
        else:
            verdict.lost.append(f"{follow_on}, which follows from {key}, never came out")
        if "dead" in places[key]:
            verdict.phantom.append(f"{key} is among the dead letters, though its consumer succeeds")
    elif work == "fail":
        if "dead" not in places[key]:
            verdict.lost.append(f"{key}, whose consumer fails, is not among the dead letters")
        if follow_on in places:
            verdict.phantom.append(f"{follow_on} came out, though the consumer of {key} fails")


def _check_effects(
    verdict: Verdict,
    intents: dict[str, Record],
    possible: set[str],
    came_out: set[str],
    history: Iterable[Record],
) -> None:
    """Check the consumers' database: each effect that the units owe, once, and no others."""
    done = Counter(each.facts["key"] for each in history if each.what == "effect")
    verdict.counts["effects"] = len(done)
    for key, intent in intents.items():
        is_wanted = intent.facts["unit"] in possible and intent.facts.get("work") != "fail"
        if not is_wanted and key in done:
            verdict.phantom.append(f"{key} was done, but should not have been")
        elif is_wanted and intent.facts.get("effect") and key in came_out and key not in done:
            verdict.lost.append(f"{key} has no effect")
    verdict.twice += [f"{key} was done {times} times" for key, times in done.items() if times > 1]


def _check_attempts(
    verdict: Verdict, history: Iterable[Record], deliveries: Iterable[Record]
) -> None:
    """Check the number of attempts, and their delays."""
    failed: dict[tuple[str, int], float] = {}  # the first failure of an attempt, plus its delay
    begun: list[tuple[float, str, int]] = []
    fresh: Counter[str] = Counter()
    broken = 0
    for each in history:
        if each.what == "failed":
            this = each.facts["key"], each.facts["attempt"]
            failed[this] = min(failed.get(this, math.inf), each.at + each.facts["delay"])
            fresh[each.facts["key"]] += this[1] == 1 and not each.facts["redelivered"]
        elif each.what == "handling":
            begun.append((each.at, each.facts["key"], each.facts["attempt"]))
        elif each.what == "fault" and "broker" in each.facts["name"]:
            broken += 1  # the broker may forget that it has delivered a message
    for at, key, attempt in begun:
        if attempt > MAX_ATTEMPTS:
            verdict.endless.append(f"{key} had attempt {attempt} of {MAX_ATTEMPTS}")
        not_before = failed.get((key, attempt - 1))
        if not_before is not None and at < not_before - _SAME_CLOCK:
            verdict.early.append(f"{key} was retried {not_before - at:.3f} s too early")
    verdict.counts["attempts"] = len(begun)
    verdict.counts["repeated attempts"] = sum(attempt > 1 for _, _, attempt in begun)
    came = Counter(each.facts["key"] for each in deliveries if each.facts["where"] == "ledger")
    for key, times in fresh.items():
        # An event that was published twice, for want of a confirm, has two first attempts.
        if times > max(1, came[key]) + broken:
            verdict.endless.append(f"{key} failed {times} times as if it were the first")
    for each in deliveries:
        attempts = each.facts.get("attempts")
        if each.facts["where"] == "dead" and attempts not in (None, MAX_ATTEMPTS):
            verdict.endless.append(f"{each.facts['key']} was given up after {attempts} attempts")


def _check_results(
    verdict: Verdict,
    history: Sequence[Record],
    intents: Mapping[str, Record],
    places: Mapping[str, set[str]],
) -> None:
    """Check what is kept of tasks: how each has ended, its value, and that no other is kept."""
    kept = {each.facts["id"]: each.facts for each in history if each.what == "result"}
    asked = {each.facts["key"] for each in history if each.what == "cancelling"}
    done = {each.facts["key"] for each in history if each.what == "effect"}
    has_killed = any(
        each.what == "killed" and each.facts["process"].startswith("calls-") for each in history
    )
    verdict.counts["results"] = len(kept)
    for key, intent in intents.items():
        task = intent.facts.get("task")
        if task is None:
            continue
        row = kept.pop(intent.facts["id"], None)
        status = None if row is None else row["status"]
        wanted = _status_wanted(intent, key in places)
        if status != wanted and not (status == "cancelled" and key in asked):
            verdict.unsettled.append(f"{key} is {status}, not {wanted}")
        if row is not None and status == "succeeded" and row["value"] != json.dumps(key):
            if row["value"] is None and task == _COMMITTING and has_killed:
                verdict.counts["values lost with a worker"] += 1
            else:
                verdict.unsettled.append(f"{key} has the value {row['value']}, {row['error']}")
        if task == _IN_SESSION and (status == "succeeded") != (key in done):
            effect = "there" if key in done else "missing"
            verdict.unsettled.append(f"{key} is {status}, its effect {effect}")
    verdict.unsettled += [f"{task_id} is {row['status']}" for task_id, row in kept.items()]


def _status_wanted(intent: Record, has_run: bool) -> str | None:
    """Return the status that is kept of a task in the end, unless it was cancelled."""
    if not has_run or intent.facts["task"] == _UNKEPT:
        return None
    return "failed" if intent.facts["work"] == "fail" else "succeeded"


def _check_cancelled(
    verdict: Verdict, history: Sequence[Record], intents: Mapping[str, Record]
) -> None:
    """Check that no task ran after it was cancelled."""
    cancelled = {each.facts["key"]: each for each in history if each.what == "cancelled"}
    for each in history:
        end = cancelled.get(each.facts.get("key", ""))
        if end is None or each.what != "delivery" or each.facts["where"] != "run":
            continue
        # One that fails may be cancelled after an attempt that began meanwhile.
        may_fail = intents[end.facts["key"]].facts["work"] in ("fail", "retry")
        last = end.at if may_fail else end.facts["since"]
        if each.at > last + _SAME_CLOCK:
            verdict.phantom.append(f"{end.facts['key']} ran after it was cancelled")


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
