"""The command line of ``outbox-consume``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from outbox import MissingExtra, __version__, exit_codes
from outbox.consumers.command.arguments import limits_of, make_parser
from outbox.consumers.command.autoreload import run_reloading
from outbox.consumers.command.limits import Limits, MemoryLimit
from outbox.service.health.policy import CPULimit, Policy, RestartBound
from outbox.service.policy_options import policy_of
from outbox.system.signals import Stop
from tests.waiting import wait_until


def limits(*arguments: str) -> Limits:
    return limits_of(make_parser().parse_args(["work", *arguments]))


def test_sizes_and_times_have_units() -> None:
    for text, size in {"300M": 300 << 20, "1.5g": 3 << 29, "64KiB": 1 << 16, "4096": 4096}.items():
        assert limits("--max-memory", text) == Limits(memory=MemoryLimit(size))
    for text, age in {"90": 90, "90s": 90, "1.5m": 90, "12h": 43200, "7d": 604800}.items():
        assert limits("--max-age", text) == Limits(age=age)
    assert limits("--max-messages", "10") == Limits(messages=10)
    assert not limits()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("-p", "0", "invalid positive integer: '0'"),
        ("-p", "x", "invalid positive integer: 'x'"),
        ("--max-messages", "-1", "invalid positive integer: '-1'"),
        ("--max-memory", "300M:6/5", "'300M:6/5' is not a limit; use for example 300M:3/5"),
        ("--max-memory", "300M:", "'300M:' is not a limit; use for example 300M:3/5"),
        ("--max-cpu", "50:0", "'50:0' is not a limit; use for example 50 or 50:5"),
        ("--max-cpu", "nan", "'nan' is not a limit; use for example 50 or 50:5"),
        ("--max-restarts", "10/x", "'10/x' is not a bound; use for example 10 or 10/2m"),
        ("--stuck-after", "0.5", "'0.5' is not a time from 1s to 7d, or 0"),
        ("--max-memory", "M", "'M' is not a size; use for example 300M or 2G"),
        ("--max-memory", "10X", "'10X' is not a size; use for example 300M or 2G"),
        ("--max-memory", "nan", "'nan' is not a size; use for example 300M or 2G"),
        ("--max-age", "0.5", "'0.5' is not a time; use for example 90s or 12h"),
        ("--max-age", "infd", "'infd' is not a time; use for example 90s or 12h"),
        ("--shutdown-timeout", "-1", "'-1' is not a number of seconds up to 604800"),
        ("--shutdown-timeout", "inf", "'inf' is not a number of seconds up to 604800"),
        ("--shutdown-timeout", "nan", "'nan' is not a number of seconds up to 604800"),
        ("--log-format", "xml", "invalid choice: 'xml'"),
    ],
)
def test_an_impossible_value_is_reported(
    capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        limits(option, value)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["--version"])
    assert caught.value.code == exit_codes.SUCCESS
    assert capsys.readouterr().out == f"outbox-consume {__version__}\n"


def test_a_missing_reloader_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(MissingExtra, match=r"--reload needs watchfiles.*\[reload\]"):
        run_reloading(lambda: 0, Stop(), 1.0)


def test_a_change_of_an_imported_module_is_noticed_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.touch()
    module = ModuleType("elsewhere")
    module.__file__ = str(elsewhere)
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    stop = Stop()

    def work() -> int:
        os.utime(elsewhere, (1, 1))
        wait_until(lambda: stop.asked)
        return exit_codes.SUCCESS

    assert run_reloading(work, stop, 10.0) == exit_codes.RECYCLED


def policy(*arguments: str) -> Policy:
    return policy_of(make_parser().parse_args(["shop.consumers", *arguments]))


def test_what_the_parent_puts_up_with() -> None:
    assert policy() == Policy(30.0, RestartBound(10, 120.0), None)
    assert policy("--stuck-after", "2m").stuck_after == 120
    assert policy("--stuck-after", "0").stuck_after == 0
    assert policy("--max-cpu", "50").cpu == CPULimit(50, 5)
    assert policy("--max-cpu", "250%:3").cpu == CPULimit(250, 3)
    assert policy("--max-restarts", "5").bound == RestartBound(5, 0.0)
    assert policy("--max-restarts", "5/10m").bound == RestartBound(5, 600.0)
    assert policy("--max-restarts", "0").bound is None


def test_a_memory_limit_may_ask_for_several_looks() -> None:
    assert limits("--max-memory", "300M:3/5") == Limits(memory=MemoryLimit(300 * 2**20, 3, 5))
