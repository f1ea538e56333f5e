"""Migrations that Alembic generates from outbox's metadata."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outbox.sql import Store
from outbox.storage.engines import open_engine

BESIDE = """
import outbox.sql
target_metadata = [outbox.sql.metadata]
"""
# As with Flask-Migrate, which knows one metadata only.
COPIED = """
import sqlalchemy
import outbox.sql
target_metadata = sqlalchemy.MetaData()
for table in outbox.sql.metadata.tables.values():
    table.to_metadata(target_metadata)
"""


@pytest.mark.parametrize("metadata", [BESIDE, COPIED], ids=["beside", "copied"])
@pytest.mark.slow
def test_a_generated_migration_creates_the_tables_and_leaves_nothing_to_do(
    database_url: str, tmp_path: Path, metadata: str
) -> None:
    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic.config", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("init", "migrations")
    settings = tmp_path / "alembic.ini"
    lines = settings.read_text().splitlines()
    settings.write_text(
        "\n".join(
            f"sqlalchemy.url = {database_url}" if line.startswith("sqlalchemy.url") else line
            for line in lines
        )
    )
    if database_url.startswith("mariadb"):
        metadata = metadata.replace("outbox.sql.metadata", 'outbox.sql.metadata_of("mariadb")')
    environment = tmp_path / "migrations" / "env.py"
    environment.write_text(environment.read_text().replace("target_metadata = None", metadata))
    alembic("revision", "--autogenerate", "-m", "outbox")
    [migration] = (tmp_path / "migrations" / "versions").glob("*.py")
    assert "outbox." not in migration.read_text()  # only what the file itself imports
    alembic("upgrade", "head")
    store = Store(open_engine(database_url))
    store.check(complete=True)
    store.engine.dispose()
    assert "No new upgrade operations detected" in alembic("check")
