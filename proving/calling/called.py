"""Tasks that write down that they run, fail, fail at first, and change the database once."""

from __future__ import annotations

import asyncio
import functools
import os
import time

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from outbox import configure, publish
from outbox.consumers import RetryPolicy
from outbox.tasks import current_task, task
from proving.checker import FOLLOW_ON, MAX_ATTEMPTS
from proving.history import Journal
from proving.programs.unit import journal

RETRY = RetryPolicy(max_attempts=MAX_ATTEMPTS, delay=0.5)
ENGINE = create_engine(os.environ["OUTBOX_DATABASE_URL"], poolclass=NullPool)
INSERT = text("INSERT INTO effects (of, id) VALUES (:of, :id)")

configure(task_session=sessionmaker(ENGINE))


class Failed(Exception):
    """The attempt fails on purpose."""


@functools.cache
def _history() -> Journal:
    """Return the journal of this worker process; the script that calls has another."""
    return journal("calls")


def _begin(key: str, work: str) -> None:
    """Write down that the task runs, and call the one that follows from it."""
    this = current_task()
    assert this is not None
    _history().write("delivery", where="run", key=key, id=this.id)
    _history().write("handling", key=key, attempt=this.attempt)
    if not key.endswith(FOLLOW_ON):
        unkept.later(key + FOLLOW_ON, "")


def _fail(work: str) -> None:
    """Raise if this attempt has to fail."""
    this = current_task()
    assert this is not None
    if work == "fail" or (work == "retry" and this.attempt == 1):
        raise Failed


@task(keep_result=False, retry=RETRY)
def unkept(key: str, work: str) -> str:
    """Keep no result."""
    _begin(key, work)
    _fail(work)
    return key


@task(retry=RETRY)
def kept(key: str, work: str) -> str:
    """Return a value, which is written once the function has returned."""
    _begin(key, work)
    time.sleep(0.005)
    _fail(work)
    return key


@task(retry=RETRY)
async def awaited(key: str, work: str) -> str:
    """Do the same on the event loop."""
    _begin(key, work)
    await asyncio.sleep(0.005)
    _fail(work)
    return key


@task(retry=RETRY, deduplicate=True)
def committing(key: str, work: str) -> str:
    """Commit its effect itself; the value follows, unless the worker is killed before."""
    _begin(key, work)
    with Session(ENGINE) as session:
        _affect(session, key)
        _fail(work)
        publish()  # before the commit, after which no attempt would repeat it
        session.commit()
    time.sleep(0.005)
    return key


@task(retry=RETRY, deduplicate=True)
def in_session(key: str, work: str, session: Session | None = None) -> str:
    """Leave the commit of its effect, its value and the inbox's note to the worker."""
    assert session is not None
    _begin(key, work)
    _affect(session, key)
    _fail(work)
    publish()
    return key


def _affect(session: Session, key: str) -> None:
    this = current_task()
    assert this is not None
    session.execute(INSERT, {"of": key, "id": this.id})
    time.sleep(0.005)
