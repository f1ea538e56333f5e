"""The name of the program, which becomes the ``app-id`` of its messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outbox.system.program_name import program_name

ROOT = Path(__file__).parents[2]
SHOW = "from outbox.system.program_name import program_name; print(program_name())"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["shop.py", "--port", "1"], "shop"),
        (["./run-shop"], "run-shop"),
        (["-m", "store"], "store"),
        (["-m", "store.jobs", "-m", "x"], "store.jobs"),
        (["folder"], "folder"),
        (["-c", SHOW], ""),
    ],
)
def test_a_program_is_called_what_was_run(tmp_path: Path, arguments: list[str], name: str) -> None:
    for file in ("shop.py", "run-shop", "store/__main__.py", "store/jobs.py", "folder/__main__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(SHOW)
    (tmp_path / "store/__init__.py").write_text(SHOW)  # before the module is known
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert set(done.stdout.splitlines()) == {name}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (None, ""),
        ([], ""),
        ([""], ""),
        (["/srv/store/__main__.py"], "store"),
        (["/srv/\udcff.py"], "?"),
        (["/srv/" + "é" * 128], "é" * 127),
    ],
)
def test_an_odd_name_is_made_to_fit(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str] | None, name: str
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    if arguments is None:
        monkeypatch.delattr(sys, "argv")
    else:
        monkeypatch.setattr(sys, "argv", arguments)
    assert program_name() == name


def test_what_a_worker_starts_has_the_name_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import outbox.consumers.isolation.process_main as module

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module.__spec__)
    assert program_name() == "outbox-consume"


@pytest.mark.parametrize(("path", "name"), [("shop.py", "shop"), ("__main__.py", "")])
def test_a_program_whose_folder_was_removed_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setattr("sys.argv", [path])
    monkeypatch.setattr("outbox.system.program_name._module", lambda: "")
    assert program_name() == name


def test_a_program_may_put_a_path_into_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [Path("bin/shop.py")])
    monkeypatch.setattr("outbox.system.program_name._module", lambda: "")
    assert program_name() == "shop"
