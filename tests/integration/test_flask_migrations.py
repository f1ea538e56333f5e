"""Migrations that Flask-Migrate generates for a project with ``Outbox(db=db)``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.sql import Store
from outbox.storage.engines import open_engine

pytestmark = pytest.mark.one_python

PROJECT = """
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.flask import Outbox


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
outbox = Outbox(db=db)
migrate = Migrate()


class Order(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)


def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = {url!r}
    db.init_app(app)
    outbox.init_app(app)
    migrate.init_app(app, db)
    return app
"""


@pytest.mark.slow
def test_a_generated_migration_keeps_the_tables_and_leaves_nothing_to_do(tmp_path: Path) -> None:
    database_url = f"sqlite:///{tmp_path}/shop.db"

    def flask(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "shop", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    (tmp_path / "shop.py").write_text(PROJECT.format(url=database_url))
    store = Store(open_engine(database_url))
    store.create()  # the tables were there before the first migration
    flask("db", "init")
    flask("db", "migrate")
    versions = tmp_path / "migrations" / "versions"
    [first] = versions.glob("*.py")
    upgrade = first.read_text().partition("def upgrade")[2].partition("def downgrade")[0]
    assert "create_table('order'" in upgrade
    assert "drop_table" not in upgrade
    flask("db", "upgrade")
    assert "No new upgrade operations detected" in flask("db", "check")
    store.check(complete=True)
    store.engine.dispose()


@pytest.mark.slow
def test_a_new_database_gets_the_tables(database_url: str, tmp_path: Path) -> None:
    test = tmp_path / "shop.py"
    test.write_text(PROJECT.format(url=database_url))
    for arguments in (["db", "init"], ["db", "migrate"], ["db", "upgrade"], ["db", "check"]):
        subprocess.run(
            [sys.executable, "-m", "flask", "--app", "shop", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            timeout=60,
            check=True,
        )
    [migration] = (tmp_path / "migrations" / "versions").glob("*.py")
    assert "outbox." not in migration.read_text()  # only what the file itself imports
    store = Store(open_engine(database_url))
    store.check(complete=True)
    store.engine.dispose()
