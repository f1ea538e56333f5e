"""A newcomer follows docs/django.md, from an empty folder to the first event."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import SQLitePlace, reading
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "django.md").read_text()

# What the page leaves to the reader: two more views, and a second database.
REST = """
import asyncio
from django.test import RequestFactory
from orders import archive, async_views, payments
from orders.models import Order

asyncio.run(async_views.place_order(RequestFactory().get("/", {"item": "milk"})))
payments.refuse(1)
archive.archive(Order.objects.get(item="tea"))
"""
ARCHIVE = """
DATABASES["archive"] = {**DATABASES["default"], "NAME": BASE_DIR / "archive.sqlite3"}
"""


def environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("OUTBOX_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[list[str]]:
    """Return the commands that the page shows before its first table."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.split("\n## ")[1], re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project as the page has it, migrated."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, *arguments in commands():
        if name == "django-admin":
            run(folder, "-m", "django", *arguments)
        elif arguments[:2] == ["manage.py", "startapp"]:
            run(folder, *arguments)
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        if named := re.match(r"# (\S+\.py)\n", snippet):
            path = folder / named[1]
            before = path.read_text() if path.name == "settings.py" else ""
            path.write_text(before + snippet)
    with (folder / "shop" / "settings.py").open("a") as file:
        file.write(ARCHIVE)
    for _, *arguments in commands():
        if arguments[:2] in (["manage.py", "makemigrations"], ["manage.py", "migrate"]):
            run(folder, *arguments)
    run(folder, "manage.py", "migrate", "--database", "archive")
    return folder


@contextlib.contextmanager
def serving(project: Path) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    log = project / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--noreload", address],
            cwd=project,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "Quit the server" in log.read_text(), 30)
        yield f"http://{address}"
    finally:
        child.terminate()
        child.wait(20)


def test_a_newcomer_sees_the_first_event(project: Path) -> None:
    place = SQLitePlace(str(project / "events.db"), "outbox")
    with reading(place, "documentation", ["#"]) as reader:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with serving(project) as url:
            form = urllib.parse.urlencode({"item": "tea"}).encode()
            with direct.open(f"{url}/orders", form, timeout=20) as response:
                assert response.status == 201
            [delivery] = reader.get()
        assert delivery.body == b'{"order_id":1,"item":"tea"}'
        run(project, "manage.py", "shell", "-c", REST)
        targets = [delivery.target for delivery in reader.get(4)]
    assert sorted(targets) == ["order.archived", "order.placed", "order.viewed", "payment.refused"]
