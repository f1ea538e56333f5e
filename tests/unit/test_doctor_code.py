"""What ``outbox doctor`` says of consumers."""

from __future__ import annotations

import logging
import re
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.doctor.broker_database_checks import file_system_of
from outbox.doctor.catalogue import all_checks
from outbox.doctor.examination import examine
from outbox.doctor.examined import SetUp

CONSUMER = """
import asyncio, logging.config, sqlite3, time
from urllib import request
from outbox.consumers import Consumer

class Invoices(Consumer):
    queue = "invoices"
    timeout = 60
    {kind} process(self, event):
        {code}
"""


@pytest.fixture
def loggers() -> Iterator[None]:
    """What a configuration of logging disables is enabled again."""
    yield
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def found(folder: Path, source: str) -> list[str]:
    name = f"app_{uuid.uuid4().hex[:8]}"
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    checks = [check for check in all_checks() if check.code in ("OBX301", "OBX303")]
    diagnosis = examine(SetUp([name], f"sqlite:///{folder}/x.db"), checks)
    assert all(finding.remedy for finding in diagnosis.findings)
    assert {check.code for check, _ in diagnosis.not_checked} <= {"OBX303"}
    return [f"{each.check.code} {each.problem.text}" for each in diagnosis.findings]


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("import no_such_module", "OBX301 .*No module named 'no_such_module'"),
        ("1 / 0", "OBX301 a module can't be imported: ZeroDivisionError"),
        ("x = 1", "OBX301 .*has no consumer"),
        (
            CONSUMER.format(kind="def", code="pass").replace("timeout = 60", ""),
            "OBX301 the consumer Invoices has no timeout",
        ),
        (
            "from outbox.tasks import task\n@task\ndef hello(): ...\n"
            "@task(timeout=5)\ndef bye(): ...\n",
            r"OBX301 the task \w+:hello has no timeout",
        ),
        (
            CONSUMER.format(kind="def", code="pass").replace("Invoices", "B").replace("def", "def")
            + "class Unnamed(Consumer):\n    def process(self, event): pass\n",
            "OBX301 .*Unnamed is not run: it has no queue",
        ),
        (
            CONSUMER.format(kind="def", code="pass")
            + "logging.config.dictConfig({'version': 1})\n",
            "OBX303 logging.config disables",
        ),
    ],
    ids=["import", "other", "none", "timeout", "task", "left out", "loggers"],
)
@pytest.mark.usefixtures("loggers")
def test_what_is_wrong_with_consumers_is_named(folder: Path, source: str, pattern: str) -> None:
    [line] = found(folder, source)
    assert re.match(pattern, line), line


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("time.sleep(1)", "calls time.sleep()"),
        ("sqlite3.connect('x')", "uses sqlite3"),
        ("request.urlopen('http://x')", "uses urllib.request"),
        ("import smtplib; smtplib.SMTP('x')", "uses smtplib"),
        ("[sqlite3.connect(one) for one in event.payload]", "uses sqlite3"),
    ],
)
def test_blocking_calls_in_coroutines_are_named(folder: Path, code: str, what: str) -> None:
    [line] = found(folder, CONSUMER.format(kind="async def", code=code))
    assert line.startswith(f"OBX301 the consumer Invoices is asynchronous, and {what}")
    assert found(folder, CONSUMER.format(kind="def", code=code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "await asyncio.sleep(time.time())",
        "await asyncio.to_thread(sqlite3.connect, 'x')",
        "await asyncio.create_subprocess_exec('x')",
    ],
)
def test_coroutines_that_wait_properly_are_fine(folder: Path, code: str) -> None:
    assert found(folder, CONSUMER.format(kind="async def", code=code)) == []


def test_the_file_system_of_a_folder_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:50 / {tmp_path} rw shared:1 - nfs4 server:/export rw\n"
        f"3 1 0:51 / {tmp_path}-other rw - tmpfs tmpfs rw\n"
    )
    assert file_system_of(str(tmp_path / "data"), str(mounts)) == "nfs4"
    assert file_system_of("/usr", str(mounts)) == "ext4"
    assert file_system_of("/usr", str(tmp_path / "none")) == ""
