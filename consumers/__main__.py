"""Entry point of ``python -m outbox.consumers``, the command ``outbox-consume``."""

import sys

from outbox.consumers.command.consume import main

if __name__ == "__main__":
    sys.exit(main())
