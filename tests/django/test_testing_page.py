"""Every snippet of the page on tests of Django projects is run as a file of a project."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.django.conftest import sqlite_settings
from tests.django.test_runners import ROOT, Project

pytestmark = pytest.mark.one_python

PAGE = ROOT / "docs" / "django-testing.md"

# What the page takes from the page on Django.
PROJECT = ROOT / "docs" / "django.md"
BEFORE = ("orders/models.py", "orders/views.py", "shop/urls.py")
SETTINGS = """
import os
from pathlib import Path

BASE_DIR = Path(__file__).parents[1]
SECRET_KEY = "tests"
INSTALLED_APPS = ["outbox.django", "orders"]
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
DATABASES = {"default": {"ENGINE": %r, "NAME": BASE_DIR / "db.sqlite3"}}
OUTBOX = {"URL": os.environ["BROKER"]}
"""


def snippets(page: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield the name of each file that a page shows, whether it goes on there, and the text."""
    for text in re.findall(r"^```(?:python|ini)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if named := re.match(r"# (\S+\.(?:py|ini))(, continued)?\n", text):
            yield named[1], named[2] is not None, text


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, "amqp://127.0.0.1:9")  # where no broker is
    project.environment["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    engine = sqlite_settings(tmp_path)["ENGINE"]
    files = {
        "orders/__init__.py": "",
        "shop/__init__.py": "",
        "shop/settings.py": SETTINGS % engine,
    }
    files.update({name: text for name, _, text in snippets(PROJECT) if name in BEFORE})
    for name, continued, text in snippets(PAGE):
        files[name] = (files[name] if continued else "") + text
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return project


def check(done: subprocess.CompletedProcess[str], *shown: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert "arning" not in output, output[-5000:]
    assert all(each in output for each in shown), output[-5000:]


def test_the_page_passes_with_django(project: Project) -> None:
    check(project.run("-m", "django", "test", "orders.tests"), "Ran 5 tests", "OK")


def test_the_page_passes_with_pytest_django(project: Project) -> None:
    check(project.run("-m", "pytest", "-q", "-p", "no:asyncio"), "9 passed")
