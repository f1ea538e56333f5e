"""The table of stored events: its schema, its statements and the store on top of them.

Needs the extra ``outbox-events[sql]``, which is SQLAlchemy 2, and the database's driver.
"""

from outbox.errors import MissingExtra

try:
    import sqlalchemy
except ModuleNotFoundError as error:
    raise MissingExtra(
        "storing events needs SQLAlchemy, which isn't installed: pip install 'outbox-events[sql]'"
    ) from error
if sqlalchemy.__version__ < "2.":
    raise MissingExtra(
        f"SQLAlchemy {sqlalchemy.__version__} is too old; 2.0 or later is needed: "
        "pip install 'outbox-events[sql]'"
    )
