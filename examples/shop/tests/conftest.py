from __future__ import annotations

import pytest
from sqlalchemy import create_engine

import outbox.sql
from examples.shop import warehouse


@pytest.fixture(autouse=True)
def database(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOP_DATABASE", str(tmp_path / "shop.db"))


@pytest.fixture
def session(tmp_path):
    """The warehouse's session, whose transaction is rolled back after the test."""
    engine = create_engine(f"sqlite:///{tmp_path}/warehouse.db")
    warehouse.Base.metadata.create_all(engine)
    connection = engine.connect()
    transaction = connection.begin()
    warehouse.connect(connection)
    warehouse.Session.configure(join_transaction_mode="create_savepoint")
    yield warehouse.Session
    warehouse.Session.remove()
    outbox.sql.bind(None)
    transaction.rollback()
    connection.close()
    engine.dispose()
