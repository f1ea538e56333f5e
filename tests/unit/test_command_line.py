"""Which commands ``outbox`` has."""

from __future__ import annotations

import re

import pytest

from outbox.commands.cli import main


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_each_command_of_the_help_is_found_by_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = re.findall(r"^    ([a-z-]+)(?: |$)", help_of(["--help"], capsys), re.MULTILINE)
    assert len(names) >= 13
    for name in names:
        alone = help_of([name, "--help"], capsys)
        assert alone.startswith(f"usage: outbox {name} "), name


def test_an_unknown_command_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["relai"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'relai'" in error
    assert "relay" in error
