"""``python -m outbox.consumers`` is the command ``outbox-consume``."""

import sys

from outbox.consumers.command.consume import main

if __name__ == "__main__":
    sys.exit(main())
