"""Outbox under the instrumentations of the libraries that it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.amqp import Inspector

ROOT = Path(__file__).parents[2]


@pytest.mark.one_python
@pytest.mark.timeout(400)  # the environment is made by the first run
@pytest.mark.slow
def test_they_see_what_is_the_applications_and_nothing_of_outbox(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    inspector.clean_up(exchange=name)
    for queue in (f"{name}-work", f"{name}-work.dead"):
        inspector.clean_up(queue=queue)
    made = subprocess.run(
        [ROOT / "scripts" / "otel-venv"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ended = subprocess.run(
        [
            f"{made.stdout.strip()}/bin/python",
            *("-m", "tests.integration.apps.instrumented", str(tmp_path), amqp_url, name),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    all_spans: dict[str, list[str]] = json.loads(ended.stdout)
    foreign = {
        what: [span for span in spans if span.startswith("opentelemetry.")]
        for what, spans in all_spans.items()
    }
    database = "sqlalchemy: {} " + str(tmp_path / "shop.db")

    def of_database(what: str) -> list[str]:
        return [span.partition("instrumentation.")[2] for span in foreign[what]]

    # They do see what outbox doesn't hide:
    connect, select = "sqlalchemy: connect", database.format("SELECT")
    assert of_database("a plain query") == [f"{connect} (root)", f"{select} (root)"]
    assert len(foreign["a plain publish"]) == 1
    assert len(foreign["a relay, not instrumented"]) > 3

    assert of_database("the application's transaction") == [connect, database.format("INSERT")]
    assert foreign["the fast path"] == foreign["a relay"] == foreign["the end"] == []
    assert all_spans["a relay"] == ["outbox: send amq.default (root)"]
    for what in ("a SQLite file as the broker", "RabbitMQ"):
        assert of_database(what) == [connect, select]  # the handler's own
        ours = [span for span in all_spans[what] if span.startswith("outbox: process")]
        # One for the message that has created the queue, five for the others, and a retry.
        assert (
            ours
            == [f"outbox: process {name}-work" + " (root)"] + [f"outbox: process {name}-work"] * 6
        )
