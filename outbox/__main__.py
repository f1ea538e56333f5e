"""Entry point of ``python -m outbox``, the command ``outbox``."""

import sys

from outbox.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
