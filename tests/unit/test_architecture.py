"""The rooms and what they may import, the public names, and the errors."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import outbox
import outbox.consumers
import outbox.sql
import outbox.tap
import outbox.tasks
import outbox.testing
from outbox import errors

ROOT = Path(__file__).parents[2]
PARTS = ("consumers", "middleware", "testing")
FRAMEWORKS = ("django", "flask")
# What the commands outbox and outbox-consume share is part of the core.
SHARED_BY_COMMANDS = ("outbox.commands", "outbox.commands.application", "outbox.commands.options")


def modules() -> dict[str, Path]:
    """Every module of the package and its file, the links resolved to the folders."""
    found = {}
    for folder in ("outbox", *PARTS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).with_suffix("").parts
            if inside[0] == "outbox" and len(inside) > 1 and inside[1] in PARTS:
                continue  # seen through a link
            name = ".".join(inside if inside[0] == "outbox" else ("outbox", *inside))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that ``path`` imports: at its top, lazily, or for the type checker alone."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


# From the ground floor up: a room imports only itself and rooms that stand above it in this list.
# Several modules in one string are one room.
ROOMS = (
    "errors exit_codes",
    "system",
    "telemetry.histogram telemetry.sources telemetry.table",
    "event header_values ids serializer credentials settings url report messages.headers",
    "messages",
    "backlog telemetry.tracing",
    "recurring",
    "spool",
    "storage",
    "transports",
    "transports.rabbitmq.amqp",
    "transports.rabbitmq.pika_connection transports.rabbitmq.pika_errors",
    "transports.rabbitmq.holding",
    "transports.rabbitmq",
    "transports.database.database transports.database.listeners transports.database.routing",
    "transports.database.server",
    "transports.database.sqlite",
    "transports.database",
    "observer publisher configuration sinks surroundings",
    "tap",
    "presence",
    "sql",
    "results",
    "unit_of_work",
    "__init__",
    "tasks.mapped tasks.codec tasks.call_arguments",
    "tasks",
    "telemetry",
    "service",
    "commands.application commands.options",
    "middleware",
    "consumers",
    "consumers.tasks",
    "consumers.discovery",
    "consumers.message",
    "consumers.event_loop",
    "consumers.isolation",
    "consumers.losses",
    "consumers.worker",
    "consumers.command",
    "consumers.__init__ consumers.__main__",
    "doctor",
    "commands __main__",
    "django",
    "flask",
    "testing",
)
FLOORS = {f"outbox.{name}": floor for floor, room in enumerate(ROOMS) for name in room.split()}
MOST_MODULES = 16
DOORS = {"transport", "subscription", "parked_queues", "ticker", "tick_records", "presence_records"}


def floor_of(module: str) -> int:
    """The floor of the innermost room that ``module`` is in."""
    for name in (f"{module}.__init__", module):
        if name in FLOORS and MODULES[module].name == "__init__.py":
            return FLOORS[name]
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def part_of(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    if second in FRAMEWORKS:
        return "frameworks"
    if second in ("commands", "doctor", "__main__") and module not in SHARED_BY_COMMANDS:
        return "commands"
    return second if second in PARTS else "core"


ALLOWED = {
    "core": {"core"},
    "middleware": {"core", "middleware"},
    "consumers": {"core", "consumers"},
    "commands": {"core", "consumers", "commands"},
    "testing": {"core", "consumers", "testing"},
    "frameworks": {"core", "middleware", "consumers", "commands", "frameworks"},
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_part_may_import(module: str) -> None:
    for name in imports(MODULES[module]):
        if name in MODULES:
            assert part_of(name) in ALLOWED[part_of(module)], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_room_and_rooms_below(module: str) -> None:
    for name in imports(MODULES[module]):
        if name in MODULES:
            assert floor_of(name) <= floor_of(module), f"{module} imports {name}"


def test_no_room_is_crowded() -> None:
    rooms: dict[Path, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            rooms[path.parent] = rooms.get(path.parent, 0) + 1
    assert not {str(room): count for room, count in rooms.items() if count > MOST_MODULES}


def test_only_the_doors_of_the_transports_share_module_names() -> None:
    names: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if path.stem not in {"__init__", "__main__"}:
            names.setdefault(path.stem, []).append(module)
    shared = {name: those for name, those in names.items() if len(those) > 1}
    assert shared.pop("wsgi") == ["outbox.telemetry.wsgi", "outbox.middleware.wsgi"]  # both public
    assert set(shared) == DOORS, shared
    assert all(one.startswith("outbox.transports.") for those in shared.values() for one in those)


@pytest.mark.parametrize(
    "package",
    [outbox, outbox.consumers, outbox.sql, outbox.tap, outbox.tasks, outbox.testing],
    ids=lambda package: package.__name__,
)
def test_no_public_name_hides_a_module(package: ModuleType) -> None:
    for name in package.__all__:
        assert f"{package.__name__}.{name}" not in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_driver_is_imported_only_in_its_own_room(module: str) -> None:
    homes = {
        "pika": ("outbox.transports.rabbitmq", "outbox.tap", "outbox.doctor.broker_probe"),
        "aio_pika": ("outbox.tap", "outbox.event"),
        "sqlalchemy": (
            "outbox.storage",
            "outbox.sql",
            "outbox.results",
            "outbox.transports.database",
            "outbox.django.connecting",
            "outbox.flask",
            "outbox.doctor",
        ),
        "django": ("outbox.django",),
        "sqlite3": (
            "outbox.spool",
            "outbox.storage",
            "outbox.sql",
            "outbox.transports.database.sqlite",
        ),
        "starlette": ("outbox.middleware.asgi",),
        "flask": ("outbox.flask",),
        "click": ("outbox.flask",),
    }
    for name in imports(MODULES[module]):
        home = homes.get(name.split(".")[0])
        assert home is None or module.startswith(home), f"{module} imports {name}"


@pytest.mark.hazard("A10")
@pytest.mark.parametrize("module", MODULES)
def test_nothing_relies_on_assert(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    # Python leaves them out under -O.
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_there_is_no_import_circle() -> None:
    graph = {
        module: {name for name in imports(path) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_module_of_the_core_imports_the_whole_package() -> None:
    for module, path in MODULES.items():
        if part_of(module) == "core":
            assert "outbox" not in set(imports(path)) or module == "outbox", module


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), module


@pytest.mark.parametrize(
    "package",
    [outbox, outbox.consumers, outbox.tap, outbox.tasks, outbox.testing],
    ids=lambda one: one.__name__,
)
def test_every_exported_name_exists_and_has_a_docstring(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


def test_the_public_names_are_exported() -> None:
    assert {
        "Event",
        "EventCollector",
        "AutoPublishingEventCollector",
        "auto_publishing",
        "enqueue_event",
        "publish",
        "publish_async",
        "clear_events",
        "configure",
        "Publisher",
        "PublishReport",
        "OutboxError",
        "UsageError",
        "BrokerError",
        "InvalidEvent",
        "CollectorFull",
        "CollectorClosed",
        "NotConfigured",
        "MissingExtra",
        "UnpublishedEvents",
        "ConnectFailed",
        "ConnectionLost",
        "Blocked",
        "PublishTimeout",
        "PublishFailed",
    } <= set(outbox.__all__)


def run_python(program: str, *options: str) -> str:
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout.strip()


def test_importing_outbox_stays_cheap() -> None:
    slow = {"asyncio", "importlib.metadata", "pika", "aio_pika", "starlette", "sqlalchemy"}
    program = (
        f"import sys; before = set(sys.modules); import outbox\n"
        f"print({slow} & set(sys.modules) - before)"
    )
    assert run_python(program) == "set()"


def test_the_version_is_that_of_the_project_installed_or_not() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert outbox.__version__ == project["version"]
    # -S: without site-packages, where the installed distribution is.
    assert run_python("import outbox; print(outbox.__version__)", "-S") == project["version"]


def test_every_module_can_be_imported() -> None:
    for _, name, _ in pkgutil.walk_packages(outbox.__path__, "outbox."):
        if not name.startswith("outbox.django."):  # which need a project: see tests/django
            importlib.import_module(name)


@pytest.mark.hazard("A12")
@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_exported_has_one_branch_and_survives_pickling(name: str) -> None:
    kind = getattr(outbox, name)
    assert issubclass(kind, outbox.OutboxError)
    if kind is not outbox.OutboxError:
        branches = (outbox.UsageError, outbox.TaskError, outbox.BrokerError)
        assert sum(issubclass(kind, branch) for branch in branches) == 1
    if kind is outbox.PublishFailed:
        error: Exception = kind(outbox.PublishReport())
    elif kind is outbox.UnpublishedEvents:
        error = kind(("1", "2"))
    else:
        error = kind("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.args) == (kind, str(error), error.args)
    assert name in (errors.__doc__ or "")


def test_a_report_that_is_not_ok_raises_when_asked_to() -> None:
    event = outbox.Event(id="1", target="x", exchange="", body=b"{}")
    fine = outbox.PublishReport(published=(event,))
    assert fine.raise_for_failure() is fine
    report = outbox.PublishReport(kept=(event,), error=outbox.ConnectionLost("gone"))
    with pytest.raises(outbox.PublishFailed, match="1 kept: gone") as caught:
        report.raise_for_failure()
    assert caught.value.report is report


@pytest.mark.hazard("C10")
def test_no_declaration_is_refused_by_any_version_of_the_broker() -> None:
    # Transient queues that are not exclusive, and a prefetch for a whole connection, are denied
    # from RabbitMQ 4.3 on.
    calls = [
        node
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    found: dict[str, list[set[str]]] = {}
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        options = {f"{one.arg}={ast.unparse(one.value)}" for one in call.keywords}
        found.setdefault(call.func.attr, []).append(options)
    declared = found["queue_declare"] + found["exchange_declare"]
    assert declared
    assert all({"durable=True", "passive=True"} & options for options in declared)
    every = {one.partition("=")[0] for options in declared for one in options}
    assert not every & {"exclusive", "auto_delete"}
    assert found["basic_qos"]
    assert not any("global" in one for options in found["basic_qos"] for one in options)


def test_the_page_of_the_architecture_names_what_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(
        r"`((?:outbox|consumers|middleware|testing|tests)/[\w/]+\.py)(?:: ([^`]+))?`", page
    )
    assert len(named) > 60
    for file, names in named:
        path = ROOT / file
        assert path.is_file(), file
        defined = {
            node.name: node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        constants = set(re.findall(r"^(\w+)\b.* = ", path.read_text(), re.MULTILINE))
        for name in filter(None, names.split(", ")):
            assert set(name.split(".")) <= defined.keys() | constants, f"{file}: {name}"
    for folder in re.findall(r"^   ([a-z_]+/[\w/]*) ", page, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
