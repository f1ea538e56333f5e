"""Relays for the tenants, whose tables are in a schema each of one database."""

from __future__ import annotations

import os
import time

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from outbox import configure
from outbox.sql import Relay
from outbox.system.signals import Signals
from proving.database import TENANTS
from proving.programs.unit import journal

_LEASE = 8.0  # seconds
_STOP = 20.0  # seconds


def main() -> None:
    journal("tenants")
    publisher = configure()
    signals = Signals(second_exits=None)
    signals.begin()
    engine = create_engine(
        os.environ["OUTBOX_DATABASE_URL"],
        poolclass=NullPool,
        connect_args={"connect_timeout": 2},
    )
    relays = [
        Relay(
            engine.execution_options(schema_translate_map={None: tenant}),
            publisher,
            lease=_LEASE,
            ordered=True,
        )
        for tenant in TENANTS
    ]
    for relay in relays:
        start(relay, signals)
    while not signals.asked:
        time.sleep(0.05)
    for relay in relays:
        relay.stop(_STOP)


def start(relay: Relay, signals: Signals) -> None:
    """Start ``relay`` as soon as the database is available."""
    while not signals.asked:
        try:
            relay.start()
        except Exception:
            time.sleep(0.5)
        else:
            return


if __name__ == "__main__":
    main()
