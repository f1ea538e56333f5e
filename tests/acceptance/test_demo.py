"""The demonstration observes what it claims, and fails when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outbox.testing.broker import find_server

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_server() is None, reason="the demo starts a RabbitMQ itself")


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )


@pytest.mark.parametrize("app", ["flask", "fastapi"])
def test_the_demo_tells_its_story(app: str) -> None:
    done = _demo("--app", app)
    assert done.returncode == 0, done.stdout + done.stderr
    for observed in (
        "on the broker: order.placed",
        "the follow-on event: invoice.sent",
        "nothing was published",
        "five orders meanwhile: HTTP 201",
        "all five arrived",
        "it has exited with 0",
        "All of it was observed.",
    ):
        assert observed in done.stdout


def test_the_demo_fails_when_a_step_is_not_observed() -> None:
    done = _demo("--app", "flask", "--consumers", "examples.shop.orders")
    assert done.returncode == 1
    assert "NOT OBSERVED: the worker consumes" in done.stdout
    assert "the module 'examples.shop.orders' has no consumer" in done.stdout
