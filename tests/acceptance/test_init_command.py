"""``outbox init``: what it writes runs, and passes its own test and the linter."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from outbox import Publisher, auto_publishing, enqueue_event
from outbox.commands.cli import main
from tests.commands import Done, run_outbox
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
LINT = ("ruff", "check", "--isolated", "--select", "B,D,E,F,I,RUF,SIM,UP,W", "--line-length", "100")

FLASK_APP = """
from flask import Flask
from outbox.flask import Outbox

app = Flask(__name__)
app.config["OUTBOX_URL"] = "sqlite:///broker.db"
Outbox(app)
"""

pytestmark = pytest.mark.one_python


def python(folder: Path, *arguments: str, **variables: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def init(folder: Path, *arguments: str) -> Done:
    return run_outbox("init", *arguments, cwd=folder, variables={"PYTHONPATH": str(ROOT)})


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_lint(folder: Path) -> None:
    python(folder, *LINT, "--ignore", "D203,D213,D100,D104", "--target-version", "py311", ".")
    python(folder, "ruff", "format", "--isolated", "--line-length", "100", "--check", ".")


def check_tests(folder: Path, count: int) -> None:
    done = python(
        folder, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error"
    )
    assert f"{count} passed" in done.stdout


def check_unit(path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    complaints = [line for line in done.stderr.splitlines() if path.name in line]
    assert not complaints


def test_a_consumer_its_test_tables_and_unit_work_as_they_are(tmp_path: Path) -> None:
    done = init(tmp_path, "order-mails", "--topic", "order.*", "--tables", "sqlite")
    assert done.returncode == 0, done.stderr
    assert "doctor order_mails_consumer; outbox-consume order_mails_consumer\n" in done.stdout
    assert written(tmp_path) == {
        *("order_mails_consumer.py", "test_order_mails_consumer.py"),
        *("outbox-order-mails.service", "outbox.sql"),
    }
    check_tests(tmp_path, 2)
    check_lint(tmp_path)
    check_unit(tmp_path / "outbox-order-mails.service")
    with closing(sqlite3.connect(tmp_path / "tables.db")) as database:
        database.executescript((tmp_path / "outbox.sql").read_text())
    url = f"sqlite:///{tmp_path}/broker.db"
    doctor = run_outbox(
        *("doctor", "order_mails_consumer", "--database", f"sqlite:///{tmp_path}/tables.db"),
        cwd=tmp_path,
        variables={"OUTBOX_URL": url},
    )
    assert (doctor.returncode, doctor.stderr) == (0, ""), doctor.stdout

    # The unit's command consumes, and says so to systemd.
    unit = (tmp_path / "outbox-order-mails.service").read_text()
    [command] = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert f"\nWorkingDirectory={tmp_path}\n" in unit
    assert f'\nEnvironment="PWD={tmp_path}"\n' in unit
    assert "\nType=notify\n" in unit
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        manager,
        Publisher(url) as publisher,
        (tmp_path / "log").open("w") as log,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        worker = subprocess.Popen(
            command.removeprefix("ExecStart=").split(),
            cwd=tmp_path,
            env={
                **os.environ,
                "OUTBOX_URL": url,
                "PYTHONPATH": str(ROOT),
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "30000000",
            },
            stderr=log,
        )
        try:
            while manager.recv(4096) != b"READY=1":
                pass
            assert "consuming" in (tmp_path / "log").read_text()
            with auto_publishing(publisher=publisher):
                enqueue_event({"id": 17}, "order.placed")
            wait_until(lambda: "order.placed: {'id': 17}" in (tmp_path / "log").read_text(), 30)
        finally:
            worker.terminate()
            assert worker.wait(30) == 0


@pytest.mark.slow
def test_it_writes_into_a_package(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    done = init(tmp_path, "invoices", "--queue", "shop.invoices", "--folder", "shop")
    assert done.returncode == 0, done.stderr
    assert "outbox-consume shop.invoices_consumer\n" in done.stdout
    assert "shop/invoices_consumer.py" in written(tmp_path)
    check_tests(tmp_path, 2)


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "test_invoices_consumer.py").write_text("mine\n")
    done = init(tmp_path, "invoices")
    assert done.returncode == 2
    assert "already there: test_invoices_consumer.py; nothing was written" in done.stderr
    assert written(tmp_path) == {"test_invoices_consumer.py"}
    done = init(tmp_path, "invoices", "--dry-run")
    assert done.returncode == 0
    assert "class Invoices(Consumer):" in done.stdout
    assert written(tmp_path) == {"test_invoices_consumer.py"}
    (tmp_path / "invoices_consumer.py").symlink_to(tmp_path / "nowhere")
    assert init(tmp_path, "invoices").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["Invoices"],
        ["in voices"],
        ["class"],
        ["invoices", "--queue", 'a"b'],
        ["invoices", "--topic", "a b"],
        ["invoices", "--folder", ".."],
        ["invoices", "--folder", "nowhere"],
        ["invoices", "--tables", "oracle"],
    ],
)
def test_what_could_not_be_a_source_file_is_refused(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *arguments]) == 2
    assert capsys.readouterr().err.startswith("outbox: ")
    assert not written(tmp_path)


def test_it_writes_for_a_flask_application(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(FLASK_APP)
    done = python(tmp_path, "flask", "outbox", "init", "invoices", "--topic", "order.placed")
    assert done.stdout.endswith("; flask outbox consume invoices_consumer\n")
    unit = (tmp_path / "outbox-invoices.service").read_text()
    assert f"{sys.executable} -m flask --app app.py outbox consume invoices_consumer -p 1" in unit
