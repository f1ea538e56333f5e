"""``outbox relay``, with the bug that is planted, if any."""

from __future__ import annotations

import sys

from outbox.commands.cli import main
from proving.programs.unit import journal

if __name__ == "__main__":
    journal("relay")
    sys.exit(main(["relay", "--ordered", "--lease", "8", "--shutdown-timeout", "20"]))
