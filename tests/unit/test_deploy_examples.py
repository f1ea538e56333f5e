"""The files of ``examples/deploy``: what they name exists, and tools that are there accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox.commands.cli import main
from outbox.consumers.command.arguments import make_parser
from outbox.telemetry.table import METRICS

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())


def names_in(text: str) -> set[str]:
    """Return the metrics in queries, of a histogram's series the histogram."""
    return {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in re.findall(r"\boutbox_[a-z_]+\b", text)
    }


def panels_of(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from dashboard["panels"]


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    queries = [
        target["expr"] for panel in panels_of(dashboard) for target in panel.get("targets", ())
    ]
    queries += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert len(queries) > 20
    assert names_in(" ".join(queries)) == set(METRICS)  # and it shows all there are
    for query in queries:
        [*names] = re.findall(r"\boutbox_[a-z_]+\b", query)
        [name] = {re.sub(r"_(bucket|sum|count)$", "", each) for each in names}
        known = {*METRICS[name].labels, "le", "job", "instance"}
        asked = set(re.findall(r"(\w+)(?:=~?|!=)\"", query))
        for group in re.findall(r"by \((.*?)\)", query):
            asked |= set(group.split(", "))
        assert asked <= known, query


def test_the_panels_of_the_dashboard_neither_overlap_nor_share_ids() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels_of(dashboard)]
    assert len(set(ids)) == len(ids)
    for panel in panels_of(dashboard):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_ask_for_metrics_that_exist() -> None:
    text = (DEPLOY / "prometheus-rules.yaml").read_text()
    asked = names_in(" ".join(re.findall(r"expr: (.*)", text)))
    assert asked
    assert asked <= set(METRICS)


def test_every_option_of_our_commands_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("start", "stop", "restart"):
        with pytest.raises(SystemExit):
            main(["workers", command, "--help"])
    known = make_parser().format_help() + capsys.readouterr().out
    lines = [
        line
        for path in FILES
        for line in path.read_text().splitlines()
        if "outbox" in line and not line.lstrip().startswith("#")
    ]
    for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", " ".join(lines)):
        assert option in known, option


@pytest.mark.parametrize("name", ["kubernetes.yaml", "prometheus-rules.yaml"])
def test_yaml_is_well_formed(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    assert documents
    for document in documents:
        containers = (
            document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ())
        )
        for container in containers:
            paths = [
                container[f"{probe}Probe"]["httpGet"]["path"]
                for probe in ("live" + "ness", "readiness")
            ]
            assert paths == ["/livez", "/readyz"]
            assert all(isinstance(argument, str) for argument in container["args"])


def is_installed(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} isn't installed")


@is_installed("systemd-analyze")
@pytest.mark.parametrize("name", ["outbox-consume.service", "outbox-relay.service"])
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    # It wants the program to be there.
    program = tmp_path / "outbox"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = (DEPLOY / name).read_text()
    text = re.sub(r"/srv/shop/venv/bin/outbox(-consume)?", str(program), text)
    done = subprocess.run(
        ["systemd-analyze", "--version"], capture_output=True, text=True, check=True
    )
    if int(done.stdout.split()[1]) < 253:
        text = text.replace("Type=notify-reload", "Type=notify")
    unit = tmp_path / name
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    ours = [line for line in done.stderr.splitlines() if name in line]
    assert not ours, done.stderr


@is_installed("monit")
def test_monit_accepts_the_service(tmp_path: Path) -> None:
    text = (DEPLOY / "outbox.monitrc").read_text()
    text = re.sub(r'as uid "shop" and gid "shop"', "", text)  # there may be no such user
    path = tmp_path / "outbox.monitrc"
    path.write_text(f"set daemon 10\n{text}")
    path.chmod(0o600)
    done = subprocess.run(
        ["monit", "-t", "-c", str(path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


@is_installed("ruby")
def test_the_file_for_god_is_ruby() -> None:
    command = ["ruby", "-c", str(DEPLOY / "outbox.god")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@is_installed("logrotate")
def test_logrotate_empties_a_log_that_stays_open(tmp_path: Path) -> None:
    log = tmp_path / "outbox-mail.log"
    text = (DEPLOY / "logrotate.conf").read_text()
    text = text.replace("/var/lib/shop/outbox", str(tmp_path))
    text = re.sub(r"^\s+su .*\n", "", text, flags=re.MULTILINE)
    (tmp_path / "conf").write_text(text)
    tmp_path.chmod(0o700)
    with log.open("a") as file:
        file.write("first\n")
        file.flush()
        subprocess.run(
            [
                "logrotate",
                *("--force", "--state", str(tmp_path / "state"), str(tmp_path / "conf")),
            ],
            check=True,
            timeout=30,
            capture_output=True,
        )
        file.write("second\n")
    assert log.read_text() == "second\n"
    [old] = tmp_path.glob("outbox-mail.log.*")
    assert old.read_text() == "first\n"
