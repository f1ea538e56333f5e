"""The command line of ``outbox-consume``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from outbox import MissingExtra, exit_codes
from outbox.consumers.command.arguments import limits_of, make_parser
from outbox.consumers.command.autoreload import run_reloading
from outbox.consumers.command.limits import Limits
from outbox.system.signals import Stop
from tests.waiting import wait_until


def limits(*arguments: str) -> Limits:
    return limits_of(make_parser().parse_args(["work", *arguments]))


def test_sizes_and_times_have_units() -> None:
    for text, size in {"300M": 300 << 20, "1.5g": 3 << 29, "64KiB": 1 << 16, "4096": 4096}.items():
        assert limits("--max-memory", text) == Limits(memory=size)
    for text, age in {"90": 90, "90s": 90, "1.5m": 90, "12h": 43200, "7d": 604800}.items():
        assert limits("--max-age", text) == Limits(age=age)
    assert limits("--max-messages", "10") == Limits(messages=10)
    assert not limits()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("-p", "0", "invalid number from 1 on value: '0'"),
        ("-p", "x", "invalid number from 1 on value: 'x'"),
        ("--max-messages", "-1", "invalid number from 1 on value: '-1'"),
        ("--max-memory", "M", "invalid size such as 300M value: 'M'"),
        ("--max-memory", "10X", "invalid size such as 300M value: '10X'"),
        ("--max-memory", "nan", "invalid size such as 300M value: 'nan'"),
        ("--max-age", "0.5", "invalid time such as 12h value: '0.5'"),
        ("--max-age", "infd", "invalid time such as 12h value: 'infd'"),
        ("--shutdown-timeout", "-1", "invalid number of seconds, a week at most value: '-1'"),
        ("--shutdown-timeout", "inf", "invalid number of seconds, a week at most value: 'inf'"),
        ("--shutdown-timeout", "nan", "invalid number of seconds, a week at most value: 'nan'"),
        ("--log-format", "xml", "invalid choice: 'xml'"),
    ],
)
def test_what_cannot_be_is_told(
    capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        limits(option, value)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_where_the_reloader_is_missing_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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
