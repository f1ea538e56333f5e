"""The Django project's tests, by Django's runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_tests_of_the_django_project_pass(tmp_path):
    root = Path(__file__).parents[3]
    project = "examples.shop.django_shop"
    done = subprocess.run(
        [sys.executable, "-m", f"{project}.manage", "test", project],
        cwd=root,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": f"{project}.settings",
            "SHOP_DATABASE": str(tmp_path / "shop.db"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr
