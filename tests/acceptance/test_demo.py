"""The demonstration observes what it claims, and fails when it does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox.testing.servers import find_postgresql, find_rabbitmq
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

# As the fixtures do: CI has a server, unless another broker was named on purpose.
REQUIRED = "CI" in os.environ and not os.environ.get("OUTBOX_TEST_AMQP_URL")
needs_rabbitmq = (
    pytest.mark.rabbitmq,
    pytest.mark.skipif(
        find_rabbitmq() is None and not REQUIRED, reason="the demo starts a RabbitMQ itself"
    ),
)


@contextmanager
def _demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo; ``folder`` is its temporary one, in which it must leave nothing."""
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()  # it then stops what it has started
    assert list(folder.iterdir()) == []


def _run_demo(folder: Path, *arguments: str) -> tuple[int, str]:
    with _demo(folder, *arguments) as child:
        output, _ = child.communicate(timeout=70)
    return child.returncode, output


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "death"),
    [
        (["--app", "flask"], "the worker is killed"),
        pytest.param(["--app", "fastapi"], "the worker is killed", marks=pytest.mark.slow),
        (["--django"], "the worker is killed"),
        pytest.param(
            ["--rabbitmq", "--app", "flask"], "the broker is killed", marks=needs_rabbitmq
        ),
        pytest.param(
            ["--rabbitmq", "--django"],
            "the broker is killed",
            marks=(*needs_rabbitmq, pytest.mark.slow),
        ),
        pytest.param(
            ["--postgresql", "--app", "flask"],
            "the broker is killed",
            marks=(
                pytest.mark.one_python,
                pytest.mark.slow,
                pytest.mark.skipif(
                    find_postgresql() is None and "CI" not in os.environ,
                    reason="the demo starts a PostgreSQL itself",
                ),
            ),
        ),
    ],
    ids=["flask", "fastapi", "django", "rabbitmq", "django on rabbitmq", "postgresql"],
)
def test_the_demo_tells_its_story(arguments: list[str], death: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # a server that root starts runs as another user
        code, output = _run_demo(Path(folder), *arguments)
    assert code == 0, output
    for observed in (
        "published: order.placed",
        death,
        "the follow-on event: invoice.sent",
        "nothing was published",
        "five orders meanwhile: HTTP 201",
        "all five arrived",
        "it stopped gracefully",
        "it exited with 0",
        "Every step was observed.",
    ):
        assert observed in output
    assert "\033" not in output


def test_the_demo_fails_when_a_step_is_not_observed(tmp_path: Path) -> None:
    code, output = _run_demo(tmp_path, "--app", "flask", "--consumers", "no.such.module")
    assert code == 1
    assert "NOT OBSERVED: the worker consumes" in output
    assert "there is no module 'no.such.module'" in output


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(signal.SIGINT, "a private RabbitMQ starts", marks=needs_rabbitmq),
        (signal.SIGTERM, "a payment is refused"),
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    options = ["--rabbitmq"] if "RabbitMQ" in moment else []
    with _demo(tmp_path, "--app", "flask", *options) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if moment in line:
                break
        children = _children(child.pid)
        while not children:  # the broker's, at the earliest moment
            children = _children(child.pid)
        child.send_signal(number)
        output, _ = child.communicate(timeout=40)
    assert child.returncode == 130, output
    assert "Traceback" not in output
    # What starts programs for it ends when it sees that its parent has.
    wait_until(lambda: not any(_runs(pid) for pid in children))


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = re.findall(r"(\d+)\s+(\d+)", listed.stdout)
    return [int(child) for child, parent in pairs if int(parent) == pid]
