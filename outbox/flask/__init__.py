"""Flask: a publisher for each application, its database session, and ``flask outbox``.

Needs the extra ``outbox-events[flask]``, which is Flask 3.
"""

from outbox.errors import MissingExtra

try:
    import flask  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra(
        "outbox.flask needs Flask, which isn't installed: pip install 'outbox-events[flask]'"
    ) from error

from outbox.flask.extension import Outbox

__all__ = ["Outbox"]
