"""The testing kit in Django's test cases, which the application's tests use."""

from __future__ import annotations

import pickle
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from django.test.utils import setup_test_environment, teardown_test_environment

from outbox import configure
from outbox.configuration import default_publisher
from outbox.testing import recorded
from tests.django.shop import cases

CASES = [
    case
    for case in vars(cases).values()
    if isinstance(case, type)
    and issubclass(case, unittest.TestCase)
    and case.__module__ == cases.__name__
    and case is not cases.FailingCase
]


@pytest.fixture
def environment() -> Iterator[None]:
    """Django's test environment."""
    setup_test_environment()
    yield
    teardown_test_environment()


def run(case: type[unittest.TestCase]) -> unittest.TestResult:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result


@pytest.mark.usefixtures("databases", "environment")
@pytest.mark.parametrize("case", CASES)
def test_the_applications_tests_pass(case: type[unittest.TestCase]) -> None:
    result = run(case)
    assert result.testsRun > 0
    assert result.wasSuccessful(), "\n".join(text for _, text in result.errors + result.failures)
    assert not result.skipped


class SentResult(unittest.TestResult):
    """Keeps what ``manage.py test --parallel`` sends to the process that shows the results."""

    def __init__(self) -> None:
        super().__init__()
        self.exceptions: list[Any] = []
        self.subtests: list[Any] = []

    def addError(self, test: Any, err: Any) -> None:
        self.exceptions.append(err[1])  # its traceback goes if tblib is installed

    def addFailure(self, test: Any, err: Any) -> None:
        self.exceptions.append(err[1])

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.subtests.append(subtest)
            self.exceptions.append(err[1])


@pytest.mark.usefixtures("databases", "environment")
@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_failures_reach_the_process_that_shows_them() -> None:
    result = SentResult()
    unittest.TestSuite(
        cases.FailingCase(name) for name in vars(cases.FailingCase) if name.startswith("fail_")
    ).run(result)
    received = pickle.loads(pickle.dumps(result.exceptions))
    assert list(map(str, received)) == list(map(str, result.exceptions))
    assert [type(each).__name__ for each in received] == [
        "AssertionError",
        "AssertionError",
        "PublishFailed",
        "UsageError",
    ]
    assert "captureOnCommitCallbacks(execute=True)" in str(received[1])
    [event] = received[2].report.published
    assert event == result.exceptions[2].report.published[0]
    [subtest] = pickle.loads(pickle.dumps(result.subtests))
    assert "number=2" in subtest.id()


@pytest.mark.usefixtures("environment")
def test_a_publisher_that_the_project_configures_is_replaced() -> None:
    publisher = configure("amqp://127.0.0.1:9")
    assert default_publisher().settings.url == "memory://"
    with recorded("a test that observes events"):
        assert default_publisher() is publisher
    teardown_test_environment()
    try:
        assert default_publisher() is publisher
    finally:
        setup_test_environment()
