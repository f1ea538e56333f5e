"""Every Python snippet of the README and the docs is executed."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import starlette.testclient

from outbox import auto_publishing, configure, enqueue_event, exit_codes
from outbox.consumers import Consumer, Worker
from outbox.consumers.command.arguments import make_parser
from outbox.django.commanding import framework
from outbox.testing import recorded
from tests.amqp import Inspector
from tests.places import SQLitePlace, reading
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "proving/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOMEPAGE: str = PROJECT["urls"]["Homepage"]
PUBLIC = {
    "outbox",
    "outbox.consumers",
    "outbox.django",
    "outbox.flask",
    "outbox.middleware.asgi",
    "outbox.middleware.wsgi",
    "outbox.serializer",
    "outbox.sql",
    "outbox.tap",
    "outbox.tasks",
    "outbox.telemetry",
    "outbox.telemetry.wsgi",
    "outbox.testing",
}
RECIPES = ROOT / "docs" / "recipes.md"
PROGRAMS = [ROOT / "docs" / f"{name}.md" for name in ("fastapi", "litestar", "starlette")]
"""Pages with a whole program, in files."""


def snippets(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Execute the page's snippets, one after the other, in one namespace."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SQLitePlace:
    """The file ``outbox.db`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    place = SQLitePlace(str(tmp_path / "outbox.db"), "outbox")
    place.bind("outbox.unroutable", "")
    return place


@pytest.fixture
def everything(
    amqp_url: str, inspector: Inspector, file: SQLitePlace, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A queue that gets every event of the default exchange."""
    monkeypatch.setenv("OUTBOX_URL", amqp_url)
    return inspector.queue("documentation", "outbox")


async def enqueue_another() -> None:
    enqueue_event({"order_id": 18}, "order.placed")


def test_the_readme_does_what_it_says(file: SQLitePlace) -> None:
    with reading(file, "documentation", ["#"]) as reader:

        def payload() -> Any:
            return json.loads(reader.get()[0].body)

        found = run(ROOT / "README.md")
        assert payload() == {"order_id": 17, "total": "12.50"}
        assert found["app"].test_client().post("/orders").status_code == 201
        assert payload() == {"order_id": 17}
        found["api"].post("/orders")(enqueue_another)
        assert starlette.testclient.TestClient(found["api"]).post("/orders").status_code == 200
        assert payload() == {"order_id": 18}


def test_the_quick_start_works_in_the_order_of_the_readme(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    for snippet in snippets(ROOT / "README.md"):
        if named := re.match(r"# (\w+\.py)\n", snippet):
            (tmp_path / named[1]).write_text(snippet)
    [start] = re.findall(r"^outbox-consume (.*?) +#.*$", page, re.MULTILINE)
    [program] = re.findall(r"`python (\w+\.py)`", page)
    [printed] = snippets(ROOT / "README.md", "text")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    output, log = tmp_path / "output", tmp_path / "log"
    with output.open("w") as stdout, log.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, "-m", "outbox.consumers", *shlex.split(start)],
            cwd=tmp_path,
            env=environment,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        wait_until(lambda: "consuming 'invoices'" in log.read_text(), 20)
        done = subprocess.run(
            [sys.executable, program],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert done.stdout + done.stderr == ""
        wait_until(lambda: output.read_text() == printed, 20)
    finally:
        worker.terminate()
        assert worker.wait(20) == exit_codes.SUCCESS


@pytest.mark.slow
def test_the_program_of_the_page_on_flask_works_in_its_order(tmp_path: Path) -> None:
    page = ROOT / "docs" / "flask.md"
    (tmp_path / "shop.py").write_text(snippets(page)[0])
    create, consume, serve, _ = snippets(page, "console")[1].splitlines()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"

    def start(line: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *shlex.split(line), *options]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=output, stderr=output
            )

    assert start(create).wait(30) == 0, log.read_text()
    worker = start(consume)
    server = start(serve, "--port", "0")
    try:
        wait_until(lambda: "consuming 'receipts'" in log.read_text(), 30)
        wait_until(lambda: "Running on" in log.read_text(), 30)
        [address] = re.findall(r"Running on (http://\S+)", log.read_text())
        order = urllib.request.Request(f"{address}/orders", method="POST")
        with urllib.request.urlopen(order, timeout=20) as response:
            assert response.status == 201
        [printed] = re.findall(r"The consumer prints `(.*?)`", page.read_text())
        wait_until(lambda: printed in log.read_text(), 20)
    finally:
        server.terminate()
        worker.terminate()
        assert worker.wait(20) == exit_codes.SUCCESS
        server.wait(20)


def test_the_first_consumer_of_the_page_on_consuming_does_what_it_says(file: SQLitePlace) -> None:
    configure(file.url)
    namespace: dict[str, Any] = {}
    exec(snippets(ROOT / "docs" / "consuming.md")[0], namespace)
    assert issubclass(namespace["Thumbnails"], Consumer)
    with reading(file, "thumbnails"):
        pass
    with reading(file, "documentation", ["#"]) as reader:
        worker = Worker([namespace["Thumbnails"]])
        worker.start()
        try:
            with auto_publishing():
                enqueue_event({"photo": 5, "size": 1}, "thumbnails", exchange="")
                enqueue_event({"size": 100_000_001}, "thumbnails", exchange="")
            [made] = reader.get()
            assert (made.target, json.loads(made.body)) == ("thumbnail.made", {"photo": 5})
            with reading(file, "thumbnails.dead", again=True) as dead:
                [letter] = dead.get()
            assert (letter.headers or {})["outbox-dead-reason"] == "too large"
        finally:
            worker.stop()


@pytest.mark.parametrize(
    "page",
    # Django's pages are projects of several files; tests/django runs them.
    [
        page
        for page in PAGES[1:]
        if page not in (RECIPES, *PROGRAMS) and not page.stem.startswith("django")
    ],
    ids=lambda page: page.stem,
)
def test_the_snippets_of_every_page_run(everything: str, page: Path) -> None:
    run(page)


def test_the_readiness_probes_of_the_page_on_publishing_open_without_an_event(
    everything: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [probe] = [one for one in snippets(ROOT / "docs" / "publishing.md") if "make_ready()" in one]
    namespace: dict[str, Any] = {"__name__": "probe"}
    exec(probe, namespace)
    web, api = namespace["app"].test_client(), starlette.testclient.TestClient(namespace["api"])
    assert not namespace["publisher"].connected
    wait_until(lambda: web.get("/ready").status_code == 200, 20)
    assert api.get("/ready").status_code == 200
    assert namespace["has_room"]()

    monkeypatch.setenv("OUTBOX_URL", "amqp://127.0.0.1:9")
    exec(probe, namespace)
    web, api = namespace["app"].test_client(), starlette.testclient.TestClient(namespace["api"])
    assert (web.get("/ready").status_code, api.get("/ready").status_code) == (503, 503)
    assert namespace["has_room"]()
    namespace["publisher"] = configure(max_kept=1, drain_timeout=0, timeout=0)
    with auto_publishing():
        enqueue_event({}, "kept")
    wait_until(lambda: not namespace["has_room"](), 10)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(ROOT / "docs" / name for name in ("tasks.md", "testing.md"))]
)
def test_the_tests_in_the_docs_pass(page: Path, everything: str) -> None:
    found = run(page)
    tests = [name for name in found if name.startswith("test_")]
    assert tests
    for name in tests:
        with recorded(name) as collected_events:
            found[name](collected_events)


def test_every_recipe_passes_as_a_separate_module(pytester: pytest.Pytester) -> None:
    modules = {}
    count = 0
    for section in RECIPES.read_text().split("\n## ")[1:]:
        found = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        modules[f"test_{section.splitlines()[0].replace(' ', '_').lower()}"] = "\n\n".join(found)
        count += "".join(found).count("def test_")
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(**modules)
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-W", "error", "--strict-markers", timeout=80
    )
    result.assert_outcomes(passed=count)


def write_program(page: Path, folder: Path) -> str:
    """Write the page's files, and return the rest of its snippets, which go on from ``shop.py``."""
    rest = "from shop import *\n"
    for snippet in snippets(page):
        if named := re.match(r"# (\w+\.py)\n", snippet):
            (folder / named[1]).write_text(snippet)
        else:
            rest += snippet
    indented = re.findall(r"^  ```python\n(.*?)^  ```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join([rest, *map(textwrap.dedent, indented)])


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
@pytest.mark.slow
def test_the_tests_of_the_program_on_a_page_pass(page: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    rest = write_program(page, pytester.path)
    (pytester.path / "test_rest.py").write_text(f"{rest}\n\ndef test_rest(): pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", timeout=80)
    result.assert_outcomes(passed=3)
    assert not (pytester.path / "shop.db").exists()


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_the_program_on_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    write_program(page, tmp_path)
    [_, commands] = snippets(page, "console")
    consume, serve, order = map(shlex.split, commands.splitlines())
    assert (consume[0], serve[0], order[:3]) == (
        "outbox-consume",
        "uvicorn",
        ["curl", "-X", "POST"],
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    [printed] = snippets(page, "text")
    output, log = tmp_path / "output", tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = []
    try:
        for module, arguments in (
            ("outbox.consumers", consume[1:]),
            ("uvicorn", [*serve[1:], "--port", port]),
        ):
            with output.open("a") as stdout, log.open("a") as stderr:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        cwd=tmp_path,
                        env=environment,
                        stdout=stdout if module == "outbox.consumers" else stderr,
                        stderr=stderr,
                    )
                )
            wait_until(lambda: "consuming 'invoices'" in log.read_text(), 30)
        wait_until(lambda: "Application startup complete" in log.read_text(), 30)
        request = urllib.request.Request(order[3].replace("8000", port), method="POST")
        with urllib.request.urlopen(request, timeout=20) as response:
            assert (response.status, json.load(response)) == (201, {"order_id": 1})
        wait_until(lambda: output.read_text() == printed, 20)
    finally:
        for process in running:
            process.terminate()
            process.wait(20)


def imported(source: str) -> set[str]:
    """Every name that ``source`` imports from the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "outbox"}


def test_the_docs_and_the_examples_import_public_names_alone() -> None:
    sources = [snippet for page in PAGES for snippet in snippets(page)]
    sources += [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    for name in set().union(*map(imported, sources)) - PUBLIC:
        module, _, attribute = name.rpartition(".")
        assert module in PUBLIC, name
        assert attribute in importlib.import_module(module).__all__, name


def test_the_readme_shows_code_early_and_stays_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 30
    assert len(lines) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(rf"{re.escape(HOMEPAGE)}/(?:blob|tree)/main/([^)#\s]+)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prose_is_wrapped_at_100_columns(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in prose.split("\n"):
        is_prose = not line.startswith(("|", "    ", "["))  # a table, code, a link's address
        assert len(line) <= 100 or not is_prose or " " not in line.removeprefix("- "), line


def test_the_readme_can_be_read_anywhere() -> None:
    page = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)|^\[[\w-]+\]: (.*)$", page, re.MULTILINE)
    assert targets
    assert all((inline or defined).startswith(HOMEPAGE) for inline, defined in targets)


COMMANDS = (
    *("pip", "outbox", "outbox-consume", "rabbitmqctl", "rabbitmqadmin"),
    *("flask", "uvicorn", "curl", "python", "django-admin"),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_shown_exists(page: Path) -> None:
    for snippet in snippets(page, "console"):
        for line in snippet.splitlines():
            command = line.split()[0]
            if command.startswith(("./", ".ci/")):
                assert (ROOT / command).exists(), command
            else:
                assert command in COMMANDS, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_use_of_the_command_outbox_in_the_docs_works(
    everything: str, inspector: Inspector, page: Path
) -> None:
    for queue in ("outbox.unroutable", "thumbnails.dead"):
        inspector.queue(queue)
    for snippet in snippets(page, "console"):
        for line in snippet.splitlines():
            command, *arguments = shlex.split(line, comments=True)
            if command == "outbox":
                subprocess.run([sys.executable, "-m", "outbox", *arguments], timeout=20, check=True)


def test_the_exit_codes_are_documented_once() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    documented = sorted(map(int, re.findall(r"^\| (\d+) \|", page, re.MULTILINE)))
    known = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    del known["RECYCLED"]  # no command as a whole exits with it
    assert documented == sorted(known.values())


def test_the_documented_options_of_the_commands_exist() -> None:
    known = "--all-pythons --whole --init --rabbitmq-4 --help --apply-to --hypothesis-profile "
    known += "--nomigrations --parallel "  # of pytest-django and Django
    known += "--max-tasks-per-child --max-memory-per-child "  # of Celery
    known += "--with-scheduler --queues "  # of RQ and delayed_job
    for command in (
        ["outbox.consumers"],
        ["outbox", "parked", "list"],
        ["outbox", "parked", "replay"],
        ["outbox", "parked", "purge"],
        ["outbox", "spool", "status"],
        ["outbox", "spool", "drain"],
        ["outbox", "migrate-transport"],
        ["outbox", "relay"],
        ["outbox", "workers", "start"],
        ["outbox", "workers", "stop"],
        ["outbox", "workers", "status"],
        ["outbox", "status"],
        ["outbox", "retry"],
        ["outbox", "sql", "ddl"],
        ["outbox", "sql", "grants"],
        ["outbox", "doctor"],
        ["outbox", "init"],
        ["outbox", "tail"],
        ["outbox", "tasks", "list"],
        ["outbox", "tasks", "show"],
        ["outbox", "tasks", "forget"],
        ["proving"],
        ["examples.demo"],
        ["flask"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        known += done.stdout
    known += make_parser("manage.py outbox consume", framework()).format_help()
    text = "".join(page.read_text() for page in PAGES)
    for option in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", text):
        assert option in known, option
    assert configure("memory://").settings.exchange == "outbox"
