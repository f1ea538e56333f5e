"""Publishing to and consuming from PostgreSQL, compared with other queues in PostgreSQL.

python -m benchmarks.databases [--rounds N] [--messages N] [--part publish|consume] [--only A;B]
    [--check]

One private PostgreSQL. The contenders take turns in each round, forwards and backwards; each
measurement runs in a new process, with empty tables. A ratio is the median of those of the rounds.
``benchmarks/peers/database`` sets up the contenders. ``benchmarks.claims`` measures claims beside
many rows, ``benchmarks.waking`` the time from a commit to its handler.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import psycopg
from sqlalchemy import make_url

from benchmarks.peers.database import CONSUMERS, MAKERS, PUBLISHERS, TABLES
from benchmarks.tables import Bound, median, print_bounds, progress, table
from outbox.testing.databases.postgresql import PrivatePostgreSQL

CHUNKS = (1, 100, 1000)

_Case = tuple[str, int]
"""A contender, and the size of its chunks; 0 if it consumes."""

BOUNDS: tuple[tuple[_Case, _Case, float], ...] = (
    (("outbox", 100), ("by hand", 100), 0.6),
    (("outbox", 1000), ("by hand", 1000), 0.75),
    (("outbox", 100), ("procrastinate", 1), 20),
    (("outbox", 1000), ("procrastinate", 1), 20),
    (("outbox", 100), ("procrastinate", 100), 2),
    (("outbox", 1000), ("procrastinate", 1000), 2),
    (("outbox", 1), ("pgqueuer", 1), 0.8),
    (("outbox", 100), ("pgqueuer", 100), 0.8),
    (("outbox", 1000), ("pgqueuer", 1000), 0.8),
    (("outbox", 0), ("by hand", 0), 0.25),
    (("outbox", 0), ("procrastinate", 0), 10),
    (("outbox", 0), ("pgqueuer", 0), 1),
    (("outbox", 0), ("pgqueuer asyncpg", 0), 1),
    (("outbox", 0), ("outbox SQLite", 0), 0.45),
)
"""What is measured, what it is compared with, and the minimum of the ratio."""

_SLOW = ("procrastinate",)
"""Those that get a fifth of the messages to consume."""


def measured(name: str, url: str, chunk: int, count: int) -> float:
    """Run the contender in a new process; return the number that it prints."""
    command = [sys.executable, "-m", "benchmarks.databases", "--run", name, url]
    done = subprocess.run(
        [*command, str(chunk), str(count)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=330,
        check=True,
    )
    return float(done.stdout.split()[-1])


def empty(url: str) -> None:
    """Empty the tables, so that none pays for what another has left."""
    address = make_url(url).set(drivername="postgresql").render_as_string()
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE")
        connection.execute("CHECKPOINT")


def turn(url: str, case: _Case, messages: int) -> float:
    """Measure a contender once; return its events per second."""
    name, chunk = case
    empty(url)
    count = messages // 5 if name in _SLOW and not chunk else messages
    if chunk:
        count = min(messages, chunk * 1000) // chunk * chunk
    return measured(name, url, chunk, count)


def report(rates: Mapping[_Case, float]) -> None:
    """Print the rates as tables."""
    names = [name for name in PUBLISHERS if (name, CHUNKS[0]) in rates]
    if names:
        head = ["events published per second", *(f"chunks of {chunk}" for chunk in CHUNKS)]
        rows = [
            [PUBLISHERS[name].name, *(f"{rates[name, chunk]:,.0f}" for chunk in CHUNKS)]
            for name in names
        ]
        print(table(head, rows), end="\n\n")
    names = [name for name in CONSUMERS if (name, 0) in rates]
    if names:
        rows = [[CONSUMERS[name].name, f"{rates[name, 0]:,.0f}"] for name in names]
        print(table(["messages consumed per second", ""], rows), end="\n\n")


def bounds(found: Mapping[_Case, Sequence[float]]) -> list[Bound]:
    """Return the bounds of what was measured."""
    return [
        Bound(
            f"{_title(one)} / {_title(other)}",
            median(ours / theirs for ours, theirs in zip(found[one], found[other], strict=True)),
            bound,
        )
        for one, other, bound in BOUNDS
        if one in found and other in found
    ]


def _title(case: _Case) -> str:
    name, chunk = case
    return f"{name}, {f'chunks of {chunk}' if chunk else 'consuming'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--messages", type=int, default=20_000, help="in each (default: 20,000)")
    parser.add_argument("--part", choices=("publish", "consume"), help="measure only this")
    parser.add_argument("--only", help="some of the contenders, separated by ;")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, url, chunk, count = options.run
        if int(chunk):
            print(PUBLISHERS[name].publish(url, int(chunk), int(count)))
        else:
            print(CONSUMERS[name].consume(url, int(count)))
        return 0
    cases: list[_Case] = []
    if options.part != "consume":
        cases += [(name, chunk) for chunk in CHUNKS for name in PUBLISHERS]
    if options.part != "publish":
        cases += [(name, 0) for name in CONSUMERS]
    if options.only:
        cases = [case for case in cases if case[0] in options.only.split(";")]
    found: dict[_Case, list[float]] = defaultdict(list)
    with PrivatePostgreSQL() as server:
        for maker in MAKERS:
            code = f"import sys; from benchmarks.peers.database import {maker} as one"
            subprocess.run(
                [sys.executable, "-c", f"{code}; one.make(sys.argv[1])", server.url], check=True
            )
        for number in range(options.rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                rate = turn(server.url, case, options.messages)
                progress(f"round {number + 1}, {_title(case)}: {rate:,.0f}/s")
                found[case].append(rate)
        address = make_url(server.url).set(drivername="postgresql").render_as_string()
        with psycopg.connect(address) as connection:
            version = connection.info.server_version // 10_000
    print(
        f"Python {platform.python_version()}, PostgreSQL {version}, {os.cpu_count()} cores\n",
        flush=True,
    )
    report({case: median(values) for case, values in found.items()})
    kept = print_bounds(bounds(found))
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
