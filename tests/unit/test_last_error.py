"""The last error that outbox has logged."""

from __future__ import annotations

import logging
import time

import pytest

from outbox.system.last_error import LastError


@pytest.fixture
def last_error() -> LastError:
    return LastError()


def test_only_errors_of_outbox_are_remembered(last_error: LastError) -> None:
    last_error.listen()
    try:
        logging.getLogger("other").error("no")
        logging.getLogger("outbox.x").warning("no")
        before = last_error.found
        logging.getLogger("outbox.x").error("first line %d\nsecond", 1)
    finally:
        last_error.end()
    found = last_error.found
    assert before is None
    assert found is not None
    assert (found.logger, found.raised, found.text) == ("outbox.x", None, "first line 1")
    assert abs(found.at - time.time()) < 10
    logging.getLogger("outbox.x").error("later")
    assert last_error.found is found


def test_the_class_of_an_exception_is_remembered(last_error: LastError) -> None:
    logger = logging.Logger("outbox.y")
    logger.addHandler(last_error)
    try:
        raise KeyError("k")
    except KeyError:
        logger.exception("it failed")
    assert last_error.found is not None
    assert (last_error.found.raised, last_error.found.text) == ("KeyError", "it failed")


def test_arguments_that_do_not_fit_do_not_raise(last_error: LastError) -> None:
    logger = logging.Logger("outbox.z")
    logger.addHandler(last_error)
    logger.error("%d of %d", 1)
    assert last_error.found is not None
    assert last_error.found.text == "%d of %d"
