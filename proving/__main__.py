"""Prove outbox's promises under faults, or prove that planted bugs are caught."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outbox.testing.broker import PrivateBroker
from proving import bounds, database_queues, faults
from proving.bugs import BUGS, Bug
from proving.checker import Verdict, check
from proving.faults import FAULTS, Fault, Planned
from proving.ground import HABITS, KINDS, Ground
from proving.history import read

_SHOWN = 10
_YOUNG = 3.0  # seconds until a new quorum queue reliably survives a kill of its only node
_AROUND = 36.0  # seconds to start before the faults, and to settle and check after them
_BUG_SECONDS = 6.0
_BUG_PATIENCE = 10.0
_BUG_DRAIN = 12.0
_BUG_ARRIVAL = 30.0
_AT_ONCE = 4


def prove(
    broker: PrivateBroker,
    name: str,
    folder: Path,
    *,
    seed: int,
    seconds: float,
    wanted: Sequence[Fault] = FAULTS,
    pause: tuple[float, float] = (0.5, 3.0),
    kinds: Collection[str] = KINDS,
    habits: Collection[str] = HABITS,
    bug: str = "",
    parking: bool = True,
    patience: float = 90.0,
    drain: float = 90.0,
    arrival: float = 120.0,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Verdict, Counter[str]]:
    """Run programs under faults; return the verdict and the number of times of each fault."""
    planned = faults.plan(random.Random(seed), seconds, wanted, pause)
    with Ground(
        broker,
        name,
        folder,
        seed=seed,
        kinds=kinds,
        habits=habits,
        bug=bug,
        parking=parking,
        own_user=any(fault.name == "no permission" for fault in wanted),
        patience=patience,
        drain=drain,
    ) as ground:
        if any("broker" in each.fault.name for each in planned):
            time.sleep(_YOUNG)
        progress(f"{len(planned)} faults in {seconds:.0f} s")
        begin = time.monotonic()
        tracks = {each.fault.track for each in planned}
        with ThreadPoolExecutor(max(1, len(tracks))) as pool:
            done = [
                pool.submit(
                    _run,
                    ground,
                    begin,
                    [each for each in planned if each.fault.track == track],
                    progress,
                )
                for track in tracks
            ]
            time.sleep(seconds)
        for track_done in done:
            track_done.result()
        ground.heal()
        progress("the faults are over: waiting until everything is settled")
        try:
            ground.settle(arrival)
        except Exception as error:  # what has happened until then can still be judged
            progress(f"settling failed: {error!r:.300}")
            ground.history.write("astray", process="the proof", how=f"did not settle: {error!r}")
    progress("checking the history")
    return check(read(folder)), Counter(each.fault.name for each in planned)


def _run(
    ground: Ground, begin: float, planned: Sequence[Planned], progress: Callable[[str], None]
) -> None:
    for each in planned:
        time.sleep(max(0.0, begin + each.at - time.monotonic()))
        ground.history.write("fault", name=each.fault.name)
        progress(f"{time.monotonic() - begin:6.1f} s  {each.fault.name}")
        _attempt(each.fault.name, each.fault.begin, ground, 1, progress)
        time.sleep(max(0.0, each.until - each.at))
        _attempt(f"the end of {each.fault.name}", each.fault.end, ground, 3, progress)
        ground.history.write("mended", name=each.fault.name)


def _attempt(
    what: str,
    action: Callable[[Ground], object],
    ground: Ground,
    tries: int,
    progress: Callable[[str], None],
) -> None:
    """Call ``action`` with ``ground`` until it succeeds: a slow machine must not end the proof."""
    for _ in range(tries):
        try:
            action(ground)
        except Exception as error:
            progress(f"{what} failed: {error!r:.300}")
        else:
            return


def seconds_of_faults(minutes: float) -> float:
    """Return the duration of the faults in a proof that takes ``minutes`` in all."""
    return max(minutes * 60 - _AROUND, minutes * 60 / 2)


def _prove_all(seed: int, minutes: float) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="outbox-proof-"))
    begin = time.monotonic()
    seconds = seconds_of_faults(minutes)
    with PrivateBroker() as broker:
        verdict, happened = prove(
            broker, "proof", folder, seed=seed, seconds=seconds, progress=_progress
        )
    print(f"{seconds:.0f} s of faults, {time.monotonic() - begin:.0f} s in all")
    _print_ledger(verdict, happened)
    if verdict.ok:
        shutil.rmtree(folder)
    else:
        print(f"the history is in {folder}")
    return verdict.ok


def _prove_database(kind: str, seed: int, minutes: float, *, calm: bool) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="outbox-proof-"))
    begin = time.monotonic()
    seconds = seconds_of_faults(minutes)
    ledger = database_queues.prove(
        kind, folder, seconds=seconds, seed=seed, pause=None if calm else 1.0
    )
    print(f"{kind}: {seconds:.0f} s of faults, {time.monotonic() - begin:.0f} s in all")
    print(database_queues.report(ledger))
    if ledger.is_clean:
        shutil.rmtree(folder)
    else:
        print(f"the history is in {folder}")
    return ledger.is_clean


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_ledger(verdict: Verdict, happened: Counter[str]) -> None:
    print("faults:", ", ".join(f"{name} {count}" for name, count in sorted(happened.items())))
    width = max(map(len, verdict.counts))
    for name, count in sorted(verdict.counts.items()):
        print(f"{name:{width}} {count:8}")
    for name, lines in verdict.findings.items():
        print(f"{name.upper():{width}} {len(lines):8}")
        for line in lines[:_SHOWN]:
            print(f"    {line}")


def _run_all(seed: int, names: Sequence[str], *, planted: bool) -> bool:
    wanted = [bug for bug in BUGS if not names or bug.name in names]
    if unknown := set(names).difference(bug.name for bug in BUGS):
        raise SystemExit(f"no such bug: {', '.join(sorted(unknown))}")
    with PrivateBroker() as broker, ThreadPoolExecutor(_AT_ONCE) as pool:
        # The broker has only one queue for unroutable events.
        parking = threading.Lock()
        judged = pool.map(lambda bug: _is_as_expected(broker, bug, seed, parking, planted), wanted)
        return all(list(judged))


def _is_as_expected(
    broker: PrivateBroker, bug: Bug, seed: int, parking: threading.Lock, planted: bool
) -> bool:
    """Return whether ``bug`` is caught in one of its tries or, not planted, nothing is found."""
    tries = bug.tries if planted else 1
    return any(_judged(broker, bug, seed + number, parking, planted) for number in range(tries))


def _judged(
    broker: PrivateBroker, bug: Bug, seed: int, parking: threading.Lock, planted: bool
) -> bool:
    """Return whether ``bug`` is caught or, if it isn't planted, whether nothing is found."""
    parks = "unbind" in bug.faults or "misaddressed" in bug.habits
    folder = Path(tempfile.mkdtemp(prefix="outbox-proof-"))
    with parking if parks else contextlib.nullcontext():
        _progress(f"{bug.name}: {'planted' if planted else 'not planted'}")
        try:
            verdict, _ = prove(
                broker,
                f"proof-{bug.name}",
                folder,
                seed=seed,
                seconds=_BUG_SECONDS,
                wanted=faults.named(bug.faults),
                pause=(0.5, 1.5),
                kinds=bug.kinds,
                habits=bug.habits,
                bug=bug.name if planted else "",
                parking=parks,
                patience=_BUG_PATIENCE,
                drain=_BUG_DRAIN,
                arrival=_BUG_ARRIVAL,
            )
        except RuntimeError as error:
            print(f"{bug.name}: not proved: {error}")
            return False
    counts = {kind: len(lines) for kind, lines in verdict.findings.items() if lines}
    done = bug.found_as in counts if planted else verdict.ok
    word = ("caught" if done else "NOT CAUGHT") if planted else ("clean" if done else "NOT CLEAN")
    print(f"{bug.name}: {word}: {counts}", flush=True)
    if done:
        shutil.rmtree(folder)
    else:
        for lines in verdict.findings.values():
            for line in lines[:_SHOWN]:
                print(f"    {line}")
        print(f"    the history is in {folder}", flush=True)
    return done


def main() -> int:
    """Run the command; the exit code is 0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="prove", description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=2.0,
        help="approximate total duration: faults and load, plus about "
        f"{_AROUND:.0f} seconds to start, settle and check; faults last at least half of it; "
        "from 2 minutes on every fault happens at least once (default: 2)",
    )
    parser.add_argument("--seed", type=int, help="seed of the fault schedule (default: random)")
    parser.add_argument(
        "--bugs", nargs="*", metavar="NAME", help="plant these bugs, or all; each must be caught"
    )
    parser.add_argument(
        "--clean",
        nargs="*",
        metavar="NAME",
        help="run the proofs of these bugs, or of all, without the bugs; nothing may be found",
    )
    parser.add_argument(
        "--bounds", action="store_true", help="show the bounds in numbers, see proving/bounds"
    )
    parser.add_argument(
        "--transport",
        choices=("rabbitmq", *database_queues.SERVERS),
        default="rabbitmq",
        help="what carries the events; a database has programs for itself (default: rabbitmq)",
    )
    parser.add_argument(
        "--calm", action="store_true", help="without faults; for databases: no transaction may fail"
    )
    options = parser.parse_args()
    if options.calm and options.transport == "rabbitmq":
        parser.error("--calm is for databases; see --clean")
    if options.bounds:
        return 0 if bounds.keep_all() else 1
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    if options.bugs is not None:
        return 0 if _run_all(seed, options.bugs, planted=True) else 1
    if options.clean is not None:
        return 0 if _run_all(seed, options.clean, planted=False) else 1
    if options.transport != "rabbitmq":
        done = _prove_database(options.transport, seed, options.minutes, calm=options.calm)
        return 0 if done else 1
    return 0 if _prove_all(seed, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
