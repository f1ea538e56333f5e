"""Every snippet of the page on tests of Django projects is run as a file of a project."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.django.test_runners import ROOT, Project

pytestmark = pytest.mark.one_python

PAGE = ROOT / "docs" / "django-testing.md"

# What the page leaves to the project.
REST = {
    "orders/__init__.py": "",
    "orders/models.py": """
from django.db import models

class Order(models.Model):
    id = models.BigAutoField(primary_key=True)
    item = models.TextField()
""",
    "shop/__init__.py": "",
    "shop/urls.py": """
from django.urls import path
from orders import views

urlpatterns = [path("orders/<str:item>", views.place_order, name="order")]
""",
}
SETTINGS = """
import os

SECRET_KEY = "tests"
INSTALLED_APPS = ["outbox.django", "orders"]
ROOT_URLCONF = "shop.urls"
OUTBOX = {"URL": os.environ["BROKER"]}
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, "amqp://127.0.0.1:9")  # where no broker is
    project.environment["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    files = dict(REST)
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        [name] = re.findall(r"\A# (\S+\.py)(?:, continued)?\n", snippet)
        files[name] = files.get(name, "") + snippet
    files["shop/settings.py"] = SETTINGS + files["shop/settings.py"]
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = tests.py test_*.py\n")
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
