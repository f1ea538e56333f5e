"""The wheel and the sdist, built and installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import outbox

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]
PARTS = ("consumers", "middleware", "testing")


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(source: Path, target: Path, kind: str) -> Path:
    _run(sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", target, ".", cwd=source)
    [built] = target.glob("*.whl" if kind == "--wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, elsewhere: builds leave nothing in the tree."""
    copy = tmp_path_factory.mktemp("checkout")
    archive = copy.with_suffix(".tar")
    _run("git", "ls-files", "-z", cwd=ROOT)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.split(b"\0")
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, listed):
            if (ROOT / name.decode()).is_symlink() or (ROOT / name.decode()).exists():
                tar.add(ROOT / name.decode(), name.decode())
    with tarfile.open(archive) as tar:
        tar.extractall(copy, filter="tar")
    return copy


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="session")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("sdist"), "--sdist")


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, whose dependencies are this environment's."""
    home = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", home, cwd=home)
    _run(home / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=home)
    [packages] = home.glob("lib/python*/site-packages")
    # Without the .pth files there, one of which names the checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def _settings() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return found


def _templates_on_disk() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "outbox").rglob("*.html")}


def _modules_on_disk() -> set[str]:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "outbox").rglob("*.py")}
    found = {path for path in found if path.split("/")[1] not in PARTS}
    for part in PARTS:
        found |= {f"outbox/{path.relative_to(ROOT)}" for path in (ROOT / part).rglob("*.py")}
    return {path for path in found if "__pycache__" not in path}


def test_every_package_on_disk_is_named_and_every_named_one_exists() -> None:
    on_disk = {
        path.removesuffix("/__init__.py").replace("/", ".")
        for path in _modules_on_disk()
        if path.endswith("/__init__.py")
    }
    assert set(_settings()["packages"]) == on_disk


def test_the_links_and_the_mapping_name_the_same_folders() -> None:
    mapping = _settings()["package-dir"]
    assert mapping == {"outbox": "outbox", **{f"outbox.{part}": part for part in PARTS}}
    links = {path.name for path in (ROOT / "outbox").iterdir() if path.is_symlink()}
    assert links == set(PARTS)
    for part in PARTS:
        assert (ROOT / "outbox" / part).readlink() == Path("..") / part


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == _modules_on_disk() | {"outbox/py.typed"} | _templates_on_disk()


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.glob("outbox_events-*")
    again = _build(source, tmp_path / "wheel", "--wheel")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        names = set(other.namelist())
        assert set(one.namelist()) == names
        for name in names:
            if not name.endswith("RECORD"):
                assert one.read(name) == other.read(name), name


def test_the_installed_wheel_imports_from_itself(installed: Path) -> None:
    output = _run(
        installed / "bin" / "python",
        "-c",
        "import outbox, outbox.consumers, outbox.middleware.asgi, outbox.middleware.wsgi\n"
        "import outbox.testing, outbox.transports.rabbitmq\n"
        "for one in (outbox, outbox.consumers, outbox.middleware, outbox.testing):\n"
        "    print(one.__file__)\n",
        cwd=installed,
    )
    for line in output.split():
        assert line.startswith(str(installed)), line


def test_nothing_of_ours_is_importable_under_a_common_name(installed: Path) -> None:
    [packages] = installed.glob("lib/python*/site-packages")
    for part in PARTS:
        assert not (packages / part).exists()


def test_the_console_scripts_show_real_commands(installed: Path) -> None:
    output = _run(installed / "bin" / "outbox-consume", "--help", cwd=installed)
    assert "outbox-consume shop.consumers" in output
    output = _run(installed / "bin" / "outbox", "parked", "--help", cwd=installed)
    assert "outbox parked list" in output
    version = _run(installed / "bin" / "outbox", "--version", cwd=installed)
    assert version == f"outbox {outbox.__version__}\n"


def test_the_pytest_plugin_is_found_and_records(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from outbox import auto_publishing, enqueue_event\n"
        "def test_it(collected_events):\n"
        "    with auto_publishing():\n"
        "        enqueue_event({'id': 1}, 'order.placed')\n"
        "    collected_events.assert_published('order.*', {'id': 1})\n"
    )
    output = _run(
        installed / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path
    )
    assert "1 passed" in output


def test_importing_outbox_imports_no_framework_and_starts_nothing(installed: Path) -> None:
    output = _run(
        installed / "bin" / "python",
        "-c",
        "import sys, threading, outbox\n"
        "print([one for one in ('pika', 'aio_pika', 'starlette', 'werkzeug', 'pytest')\n"
        "       if one in sys.modules], threading.active_count())",
        cwd=installed,
    )
    assert output.strip() == "[] 1"
