"""``outbox relay``, with the bug that is planted, if any."""

from __future__ import annotations

import sys

from outbox import exit_codes
from outbox.commands.cli import main
from proving.programs.unit import journal

if __name__ == "__main__":
    journal("relay")
    code = main(["relay", "--ordered", "--lease", "8", "--shutdown-timeout", "20"])
    # What it could not give back, with the database or the broker away, is the checker's to judge.
    sys.exit(exit_codes.SUCCESS if code == exit_codes.UNFINISHED else code)
