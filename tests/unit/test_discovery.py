"""Which consumers ``outbox-consume`` finds in a module, and what it says about the others."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox import Publisher, UsageError, exit_codes
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.consumers.discovery import load

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules into the working directory; they are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(PRELUDE + textwrap.dedent(text))

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


PRELUDE = """
from abc import ABC, abstractmethod
from outbox.consumers import Consumer, consumer
"""

BILLING = """
class Invoices(Consumer):
    queue = "invoices"
    def process(self, event): pass

@consumer("reminders")
def remind(event): pass

def made(name):
    return consumer(name)(lambda event: None)
"""


def queues(*names: str) -> list[str]:
    return [consumer.queue for consumer in load(names)]


def test_consumers_that_a_module_only_imports_are_not_run(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("billing", BILLING)
    write(
        "shop",
        """
        from billing import Invoices, made, remind
        class Mine(Consumer):
            queue = "mine"
            def process(self, event): pass
        class Paid(Invoices):
            queue = "paid"
        generated = made("generated")  # in another module, but for this one
        """,
    )
    assert queues("shop") == ["mine", "paid", "generated"]
    assert "billing:Invoices is not run: shop only imports it; name billing:Inv" in caplog.text
    assert "billing:remind is not run" in caplog.text
    caplog.clear()
    assert sorted(queues("shop", "billing")) == [
        "generated",
        "invoices",
        "mine",
        "paid",
        "reminders",
    ]
    assert not caplog.text
    assert queues("shop", "shop:remind") == ["mine", "paid", "generated", "reminders"]


def test_a_module_that_collects_consumers_runs_what_it_imports(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("billing", BILLING)
    write("everything", "from billing import Invoices, remind")
    assert queues("everything") == ["invoices", "reminders"]
    write(
        "listed",
        """
        from billing import Invoices
        __all__ = ["Invoices", "mine"]
        @consumer("mine")
        def mine(event): pass
        """,
    )
    assert queues("listed") == ["invoices", "mine"]
    write("package.mail", '@consumer("mail")\ndef mail(event): pass')
    write(
        "package.__init__",
        "from package.mail import mail\n@consumer('own')\ndef own(event): pass",
    )
    assert queues("package") == ["mail", "own"]
    assert not caplog.text


def test_a_base_class_is_not_run_beside_what_is_made_from_it(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        "shop",
        """
        class Base(Consumer):
            queue = "jobs"
            def process(self, event): pass
        class Special(Base):
            pass
        class Abstract(Consumer, ABC):
            queue = "abstract"
            @abstractmethod
            def render(self): ...
            def process(self, event): pass
        class Handlerless(Consumer):
            queue = "default"
        class Handler(Handlerless):
            queue = "handler"
            def process(self, event): pass
        class Mailer(Consumer):
            queue = "mail"
            def __init__(self, host): self.host = host
            def process(self, event): pass
        mailer = Mailer("localhost")
        class PerTenant(Consumer):
            def __init__(self, queue): self.queue = queue
            def process(self, event): pass
        one, two = PerTenant("one"), PerTenant("two")
        """,
    )
    consumers = load(["shop"])
    assert [type(consumer).__name__ for consumer in consumers[:2]] == ["Special", "Handler"]
    assert [each.queue for each in consumers] == ["jobs", "handler", "mail", "one", "two"]
    assert queues("shop:mailer") == ["mail"]
    assert not caplog.text


def test_what_looks_like_a_consumer_and_is_not_run_is_logged(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        "shop",
        """
        class Forgotten(Consumer):
            def process(self, event): pass
        class _Base(Consumer):
            def process(self, event): pass
        class Outer:
            class Inner(Consumer):
                queue = "inner"
                def process(self, event): pass
        @consumer("work")
        def work(event): pass
        """,
    )
    assert queues("shop") == ["work"]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "shop:Forgotten is not run: it has no queue; set queue = 'name', or _ before a base's name",
        "shop:Outer.Inner is not run: it is nested; name shop:Outer.Inner",
    ]
    assert queues("shop:Outer.Inner") == ["inner"]
    caplog.clear()
    load(["shop"], warn=False)
    assert not caplog.text
    write("alone", "class Forgotten(Consumer):\n    def process(self, event): pass")
    with pytest.raises(UsageError, match="and no task; alone:Forgotten it has no queue"):
        load(["alone"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shop.py", "there is no module 'shop.py'; did you mean 'shop'?"),
        ("./shop", "'./shop' is not the name of a module"),
        ("", "'' is not the name of a module"),
        ("shop:Nothing", "shop:Nothing is not a consumer: there is no such attribute"),
        ("shop:Abstract", "Abstract is abstract: it has no render()"),
        ("shop:Mailer", "Mailer takes arguments: make an instance"),
        ("shop:NoQueue", "shop:NoQueue has no queue"),
        ("shop:no_queue", "shop:no_queue has no queue"),
        ("shop:text", "shop:text is not a consumer"),
    ],
)
def test_a_wrong_name_is_refused_with_the_remedy(write: Write, name: str, expected: str) -> None:
    write(
        "shop",
        """
        class Abstract(Consumer, ABC):
            queue = "abstract"
            @abstractmethod
            def render(self): ...
        class Mailer(Consumer):
            queue = "mail"
            def __init__(self, host): self.host = host
            def process(self, event): pass
        class NoQueue(Consumer):
            def process(self, event): pass
        no_queue = NoQueue()
        text = "jobs"
        """,
    )
    with pytest.raises(UsageError) as raised:
        load([name])
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("import helper", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("from json import nothing", "ImportError: cannot import name 'nothing'"),
        ("nothing", "NameError: name 'nothing' is not defined"),
    ],
)
def test_what_can_not_be_imported_is_wrong_usage_with_the_applications_frames(
    write: Write, tmp_path: Path, text: str, last: str
) -> None:
    write("helper", "import no_such_dependency")
    write("shop", text)
    with pytest.raises(UsageError) as raised:
        load(["shop"])
    message = str(raised.value)
    assert message.startswith("cannot import the module 'shop':\n")
    assert last in message
    files = [line.split('"')[1] for line in message.splitlines() if line.startswith("  File ")]
    assert files
    assert all(Path(file).parent == tmp_path for file in files)


def test_the_command_ends_with_the_code_for_wrong_usage(write: Write, tmp_path: Path) -> None:
    write("shop", "import no_such_dependency")
    write("exits", "import sys\nsys.exit(0)")
    for module, form in (("shop", "text"), ("shop", "json"), ("exits", "text")):
        command = [sys.executable, "-m", "outbox.consumers", module, "--log-format", form]
        done = subprocess.run(
            [*command, "--url", "memory://"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == exit_codes.USAGE
        if form == "json":
            [line] = [json.loads(line) for line in done.stderr.splitlines()]
            assert line["level"] == "CRITICAL"
            assert "no_such_dependency" in line["message"]
        else:
            assert done.stderr.startswith("outbox-consume: ")
            assert module in done.stderr


def test_what_may_pass_is_not_wrong_usage(write: Write) -> None:
    write("settings", "import os\nos.environ['NO_SUCH_VARIABLE']")
    with pytest.raises(KeyError):
        load(["settings"])
    write("busy", "from outbox import ConnectionLost\nraise ConnectionLost('gone')")
    with pytest.raises(RuntimeError, match="the broker was unavailable while the module 'busy'"):
        load(["busy"])


DISABLES = """
import logging.config
logging.config.dictConfig({"version": 1, "root": {"level": "WARNING"}})
@consumer("work")
def work(event): pass
"""


def test_loggers_that_the_application_disables_are_enabled_again(
    write: Write, tmp_path: Path
) -> None:
    write("shop", DISABLES)
    script = """
        import logging
        from outbox.consumers.discovery import load
        from outbox.consumers.logs import set_up
        import outbox.consumers.worker.worker
        set_up("INFO", "text")
        for _ in range(2):
            load(["shop"])
        for name in ("outbox.consumer", "outbox.consumer.messages", "outbox.publisher"):
            logging.getLogger(name).error("this is seen")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("this is seen") == 3
    assert done.stderr.count("disable_existing_loggers=False") == 1


def test_a_worker_in_code_warns_of_disabled_loggers(tmp_path: Path) -> None:
    class Work(Consumer):
        queue = "work"

        def process(self, event: ReceivedEvent) -> None:
            pass

    logger = logging.getLogger("outbox.consumer.messages")
    with Publisher(f"sqlite:///{tmp_path}/outbox.db") as publisher:
        worker = Worker([Work], publisher=publisher)
        logger.disabled = True
        try:
            with pytest.warns(UserWarning, match="'outbox.consumer.messages' is disabled"):
                worker.start()
        finally:
            logger.disabled = False
            worker.stop(1)


DJANGO_SHOP = """
from django.apps import apps
apps.get_app_configs()  # raises AppRegistryNotReady before django.setup()
@consumer("work")
def work(event): pass
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("shop_settings", "work"),
        (None, "Set DJANGO_SETTINGS_MODULE: then outbox-consume calls django.setup() first."),
        ("missing_settings", "cannot import the Django project"),
    ],
)
def test_django_is_set_up_before_its_models_are_imported(
    write: Write, tmp_path: Path, settings: str | None, expected: str
) -> None:
    pytest.importorskip("django")
    write("shop", DJANGO_SHOP)
    write("shop_settings", "SECRET_KEY = 'x'\nINSTALLED_APPS = ['django.contrib.contenttypes']")
    environment = {name: os.environ[name] for name in os.environ if "DJANGO" not in name}
    if settings is not None:
        environment["DJANGO_SETTINGS_MODULE"] = settings
    script = (
        "from outbox import UsageError\nfrom outbox.consumers.discovery import load\n"
        "try:\n    print(load(['shop'])[0].queue)\nexcept UsageError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stdout
