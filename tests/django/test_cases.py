"""The testing kit in Django's test cases, which the application's tests use."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest
from django.test.utils import setup_test_environment, teardown_test_environment

from tests.django.shop import cases

CASES = [
    case
    for case in vars(cases).values()
    if isinstance(case, type)
    and issubclass(case, unittest.TestCase)
    and case.__module__ == cases.__name__
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
